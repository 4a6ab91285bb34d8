"""Put a model where the replicas will find it, and write down its digests.

For Ollama that is a store with one model, for llama.cpp one GGUF file, for vLLM and SGLang a
Hugging Face folder. Files that fit as they are get linked, or copied where that is impossible.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FormatError
from ...shardio.assets import load_json
from ...shardio.layout import Layout
from ...shardio.stream import Progress
from ..gguf import open_gguf
from ..ollama.build import Wishes, make_modelfile
from ..ollama.ends import end_token_overrides
from ..ollama.facts import ModelFacts, facts_of, make_facts, open_with
from ..ollama.install import install
from ..ollama.names import parse_name
from ..ollama.store import Store, hash_file
from ..quantize import QuantizeOptions, quantize_gguf
from ..reshard import reshard
from ..to_gguf import GgufReport, to_gguf
from .servers import HF_KINDS, KindName


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A model in the ``models`` folder.

    Attributes:
        file: its path below the folder; its name in the store for Ollama.
        facts: of the model.
        weights: bytes of its tensors.
        digests: ``sha256:<hex>`` by path below the folder.
        gguf: path of the GGUF file, if it is one.
        warnings: what a user should know.
    """

    file: str
    facts: ModelFacts
    weights: int
    digests: Mapping[str, str]
    gguf: Path | None
    warnings: tuple[str, ...] = field(default=())

    def checksums(self) -> str:
        """Return the digests as ``sha256sum -c`` reads them."""
        return "".join(
            f"{digest.removeprefix('sha256:')}  {path}\n"
            for path, digest in sorted(self.digests.items())
        )


def place(
    source: Path,
    models: Path,
    kind: KindName,
    name: str,
    quantize: str | None,
    wishes: Wishes,
    options: dict[str, Any],
    progress: Progress | None = None,
) -> Placed:
    """Write a model into the folder ``models``, converting it if it is not what ``kind`` wants.

    Raises:
        MconvError: it cannot be converted, or its prompts not be proven (Ollama).
    """
    if not source.exists():
        raise FormatError(f"{source}: no such file or folder")
    if kind in HF_KINDS:
        return _hf(source, models, name, quantize, options, progress)
    if kind == "ollama":
        return _store(source, models, name, quantize, wishes, options, progress)
    return _gguf(source, models, name, quantize, options, progress)


def _store(
    source: Path, models: Path, name: str, quantize: str | None, wishes: Wishes,
    options: dict[str, Any], progress: Progress | None,
) -> Placed:  # fmt: skip
    store, parsed = Store(models), parse_name(name)
    done = install(
        source, parsed, store, wishes, quantize=quantize, options=options, progress=progress
    )
    manifest = store.read(parsed)
    digests = {f"blobs/{store.blob_path(b.digest).name}": b.digest for b in manifest.blobs()}
    path = Path("manifests") / parsed.path
    digests[path.as_posix()] = hash_file(models / path)
    weights = store.blob_path(done.digest)
    return Placed(
        file=str(parsed), facts=facts_of_gguf(weights), weights=tensor_bytes(weights),
        digests=digests, gguf=weights, warnings=done.warnings,
    )  # fmt: skip


def _gguf(
    source: Path, models: Path, name: str, quantize: str | None, options: dict[str, Any],
    progress: Progress | None,
) -> Placed:  # fmt: skip
    target = models / f"{name.replace('/', '-').replace(':', '-')}.gguf"
    change = end_token_change(facts_of(source, **options))
    wanted = QuantizeOptions(override_kv=change, imatrix=options.get("imatrix"))
    if source.suffix != ".gguf":
        converted(source, target, quantize, options, wanted, progress=progress)
    elif quantize or change or len(open_gguf(source).paths) > 1:
        quantize_gguf(source, target, [quantize or "COPY"], wanted, progress=progress)
    else:
        link_or_copy(source, target)
    digest = hash_file(target, progress)
    return Placed(
        file=target.name, facts=facts_of_gguf(target), weights=tensor_bytes(target),
        digests={target.name: digest}, gguf=target,
    )  # fmt: skip


def converted(
    source: Path,
    target: Path,
    quantize: str | None,
    options: Mapping[str, Any],
    wanted: QuantizeOptions,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> GgufReport:
    """Convert a checkpoint to GGUF in its own 16-bit type, or ``quantize``."""
    given, rest = open_with(source, options)
    return to_gguf(
        given, target, quantize or "auto", quantization=wanted,
        dry_run=dry_run, progress=progress, **rest,
    )  # fmt: skip


def end_token_change(facts: ModelFacts) -> tuple[str, ...]:
    """Return the metadata change that lets llama.cpp see where answers end, if one is needed."""
    made = make_modelfile(facts, Wishes(source="x", allow_template_drift=True))
    stops = made.modelfile.parameters.get("stop", ())
    return end_token_overrides(facts, stops if isinstance(stops, tuple) else ())


def _hf(
    source: Path, models: Path, name: str, quantize: str | None, options: dict[str, Any],
    progress: Progress | None,
) -> Placed:  # fmt: skip
    if quantize:
        raise ConfigError(f"-q {quantize}: vLLM and SGLang take the Hugging Face folder as it is")
    if source.suffix == ".gguf":
        raise ConfigError(f"{source}: vLLM and SGLang want a checkpoint or a Hugging Face folder")
    target = models / name.replace("/", "-").replace(":", "-")
    found = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    if found and (source / "config.json").is_file() and not options:
        target.mkdir()
        for path in sorted(p for p in source.iterdir() if p.is_file()):
            if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt", ".md"):
                link_or_copy(path, target / path.name)
    else:
        given, rest = open_with(source, options)
        reshard(given, target, Layout("hf"), progress=progress, **rest)
    files = sorted(p for p in target.rglob("*") if p.is_file())
    return Placed(
        file=target.name, facts=facts_of_hf(target), gguf=None,
        weights=sum(p.stat().st_size for p in files if p.suffix == ".safetensors"),
        digests={p.relative_to(models).as_posix(): hash_file(p, progress) for p in files},
    )  # fmt: skip


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system does not allow that."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
    if not target.stat().st_mode & 0o004:
        target.unlink()
        shutil.copyfile(real, target)
        target.chmod(0o644)


def tensor_bytes(path: Path) -> int:
    """Return the bytes of all tensors of a GGUF file."""
    return sum(info.nbytes for info in open_gguf(path).tensors.values())


def facts_of_gguf(path: Path) -> ModelFacts:
    """Return the facts of a GGUF file, whatever its name ends with."""
    return make_facts(path, {key: kv.value for key, kv in open_gguf(path).entries.items()})


#: Keys of GGUF metadata to those of config.json.
_CONFIG_KEYS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "vocab_size": ("vocab_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}


def facts_of_hf(folder: Path) -> ModelFacts:
    """Return what config.json says of a model's size; any architecture will do."""
    config = load_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'}: expected a JSON object")
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, dict) else config
    metadata: dict[str, Any] = {"general.architecture": "hf"}
    for key, names in _CONFIG_KEYS.items():
        value = next((config[n] for n in names if config.get(n) is not None), None)
        if value is not None:
            metadata[f"hf.{key}"] = value
    return make_facts(folder / "config.json", metadata)


def planned(
    source: Path, kind: KindName, quantize: str | None, options: Mapping[str, Any]
) -> tuple[ModelFacts, int]:
    """Return the facts of a model and the bytes of its tensors, before anything is written.

    Raises:
        MconvError: it cannot be converted.
    """
    if kind in HF_KINDS:
        if (source / "config.json").is_file() and not options:
            files = source.glob("*.safetensors")
            return facts_of_hf(source), sum(path.stat().st_size for path in files)
        given, rest = open_with(source, options)
        facts = facts_of(source, **options)
        report = reshard(given, source.with_name("planned"), Layout("hf"), dry_run=True, **rest)
        return facts, report.nbytes
    wanted = QuantizeOptions(imatrix=options.get("imatrix"))
    out = source.with_name("planned.gguf")
    if source.suffix != ".gguf":
        made = converted(source, out, quantize, options, wanted, dry_run=True)
        return make_facts(source, {kv.key: kv.value for kv in made.metadata}), made.nbytes
    facts = facts_of(source, **options)
    if not quantize:
        return facts, tensor_bytes(source)
    outputs = quantize_gguf(source, out, [quantize], wanted, dry_run=True).outputs
    return facts, outputs[0].data_bytes
