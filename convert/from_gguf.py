"""``mconv.from_gguf``: a GGUF model back into a Hugging Face folder that transformers loads.

Weights, config.json, generation settings, tokenizer, chat template and model card come back; the
folder is then planned as a GGUF file in memory, and whatever would come out differently is told.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import ConfigError, MconvError, UnsupportedError
from ..shardio import Checkpoint, Layout, dtypes
from ..shardio.assets import find_assets, load_json
from ..shardio.safetensors_plan import plan_bytes, plan_json
from ..shardio.staging import fingerprint, write_folder
from ..shardio.stream import Limits, OutFile, Progress
from ..shardio.writers import get_writer
from .architectures import (
    Architecture,
    Stored,
    architectures,
    complete_config,
    find_architecture,
    restored_config,
)
from .from_gguf_card import generation_config, model_card
from .from_gguf_tensors import Restored, main_dtype, refuse, restored_weights
from .gguf import GgufFile, open_gguf
from .gguf.files import SPLIT_KEYS
from .gguf.tensors import GgufTensors
from .to_gguf import to_gguf
from .tokenizers.restore import restore_tokenizer
from .tokenizers.stored import stored_vocabulary
from .tokenizers.vocabulary import ID_KEYS

_CONFIG = "config.json"
_MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


@dataclass(frozen=True, slots=True)
class FromGgufReport:
    """What was written, or would be.

    Attributes:
        source, target: file and folder.
        architecture: ``general.architecture``.
        model: class of the Hugging Face model.
        dtype: of most weights.
        files: name to bytes.
        tensors, parameters: number of weights and of their elements.
        differences: metadata keys and tensors that a conversion back would not give again.
        warnings: what a user should know.
    """

    source: Path
    target: Path
    architecture: str
    model: str
    dtype: str
    files: Mapping[str, int]
    tensors: int
    parameters: int
    differences: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def from_gguf(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    max_shard_size: int | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> FromGgufReport:
    """Write a GGUF model as a Hugging Face folder.

    Args:
        src: the file, or any file of a split model.
        dst: output folder.
        dtype: ``f32``, ``f16`` or ``bf16`` for all weights; None: as they are stored, quantized
            blocks decoded to 16 bits.
        config: the model's own config.json, or its folder, instead of one made of the metadata.
        tokenizer: folder with the model's own tokenizer, instead of one made of the metadata.
        max_shard_size: bytes of tensor data per safetensors file.
        force: replace an existing folder.
        resume: continue an interrupted run.
        dry_run: plan and check everything, write nothing.
        limits: memory and threads.
        progress: called with (bytes done, bytes in all).

    Raises:
        MconvError: a damaged file, an architecture that is not brought back, tensors that do not
            fit; nothing is left behind.
    """
    file = open_gguf(src)
    wanted = dtypes.parse(dtype) if dtype is not None else None
    model = _model(file, wanted, Path(config) if config is not None else None)
    small, warnings = _small_files(file, model, Path(tokenizer) if tokenizer is not None else None)
    ckpt = Checkpoint(
        path=Path(src),
        format="gguf",
        weights=model.restored.weights,
        config=model.config,
        warnings=tuple(warnings),
    )
    planned = get_writer("hf").plan(ckpt, Layout("hf", max_shard_size=max_shard_size))
    own = next(f for f in planned.files if f.name == _CONFIG)
    files = [*planned.files, *(plan_bytes(name, data) for name, data in small.items())]
    files.append(plan_json("mconv.json", _provenance(file, dtype)))
    exact = wanted is None and not model.restored.decoded
    with tempfile.TemporaryDirectory(prefix="mconv-from-gguf-") as scratch:
        folder = Path(scratch) / (Path(dst).name or "model")
        folder.mkdir()
        for name, data in {**small, _CONFIG: _content(own)}.items():
            (folder / name).write_bytes(data)
        found = replace(ckpt, path=folder, assets=find_assets([folder]))
        differences = _differences(found, file, exact=exact)
    report = FromGgufReport(
        source=file.paths[0],
        target=Path(dst),
        architecture=model.architecture.name,
        model=str(model.config["architectures"][0]),
        dtype=dtypes.name(wanted if wanted is not None else main_dtype(file)),
        files={f.name: f.size for f in files},
        tensors=len(ckpt.weights),
        parameters=ckpt.num_parameters,
        differences=differences,
        warnings=(*warnings, *planned.warnings),
    )
    if not dry_run:
        plan = fingerprint(files, file.paths, json.dumps([dtype]))
        write_folder(
            report.target, files, plan=plan, sources=file.paths, force=force, resume=resume,
            limits=limits, progress=progress,
        )  # fmt: skip
    return report


@dataclass(frozen=True, slots=True)
class _Model:
    """A record, the configuration it gives and the tensors that go with it."""

    architecture: Architecture
    config: dict[str, Any]
    restored: Restored


def _model(file: GgufFile, dtype: np.dtype | None, own: Path | None) -> _Model:
    """Find the record whose table fits the file's tensors."""
    name = file.get("general.architecture")
    if not file.tensors:
        raise ConfigError(f"{file.paths[0]}: holds no tensors, only a vocabulary")
    known = [r for r in architectures().values() if r.restore is not None]
    candidates = [r for r in known if r.name == name]
    if own is not None:
        given = load_json(own / _CONFIG if own.is_dir() else own)
        candidates = [find_architecture(given)]
    if not candidates:
        names = ", ".join(sorted({r.name for r in known}))
        raise UnsupportedError(
            f"{file.paths[0]}: models of the architecture {name!r} are not brought back; those of "
            f"{names} are"
        )
    tried = []
    for record in candidates:
        config = dict(given) if own is not None else _restored(record, file)
        restored = restored_weights(record, complete_config(config, record), file, dtype)
        if not restored.problems:
            if restored.packed:
                config["quantization_config"] = _MXFP4
            return _Model(record, config, restored)
        tried.append((len(restored.problems), restored, record))
    _, restored, record = min(tried, key=lambda one: one[0])
    raise refuse(restored.problems, record, file)


def _restored(record: Architecture, file: GgufFile) -> dict[str, Any]:
    prefix, tensors = f"{record.name}.", GgufTensors(file)
    stored = Stored(
        {k.removeprefix(prefix): file[k] for k in file.entries if k.startswith(prefix)},
        {name: info.shape for name, info in file.tensors.items()},
        lambda name: np.asarray(tensors.values(name).read(), np.float32),
    )
    try:
        config = restored_config(record, stored)
    except ConfigError as error:
        raise ConfigError(f"{file.paths[0]}: {error}") from error
    ids = {role: file[key] for role, key in ID_KEYS.items() if key in file}
    for role, index in ids.items():
        config[f"{role}_token_id"] = index
    for role in ("bos", "eos", "pad"):  # classes have numbers of their own for what is not said
        config.setdefault(f"{role}_token_id", None)
    return config


def _small_files(
    file: GgufFile, model: _Model, tokenizer: Path | None
) -> tuple[dict[str, bytes], list[str]]:
    """Return the files beside the weights, and warnings."""
    warnings = []
    if model.restored.decoded:
        warnings.append(
            f"tensors of {', '.join(model.restored.decoded)} are decoded: what quantization "
            "rounded away does not come back"
        )
    if tokenizer is not None:
        folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
        small = {p.name: p.read_bytes() for p in find_assets([folder]) if p.name != _CONFIG}
    else:
        context = file.get(f"{model.architecture.name}.context_length")
        vocabulary = stored_vocabulary(file.entries, file.paths[0])
        small = dict(restore_tokenizer(vocabulary, max_length=context).files)
    ids = {role: file[key] for role, key in ID_KEYS.items() if key in file}
    settings = generation_config(file.entries, ids)
    small["generation_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    small["README.md"] = model_card(file.entries)
    return small, warnings


def _content(out: OutFile) -> bytes:
    data: bytes = out.parts[0][1].data  # type: ignore[attr-defined]  # a BytesPayload
    return data


def _differences(ckpt: Checkpoint, file: GgufFile, *, exact: bool) -> tuple[str, ...]:
    """Plan the folder as a GGUF file and return what is not as in the file it came from."""
    kind = dtypes.name(main_dtype(file)).replace("float", "f")
    try:
        again = to_gguf(ckpt, ckpt.path / "again.gguf", kind, verify=False, dry_run=True)
    except MconvError as error:
        return (f"converting it again fails: {error}",)
    skipped = (*SPLIT_KEYS, "general.alignment")
    loose = () if exact else ("general.file_type", "quantize.", "general.quantized_by")
    ours = {e.key: e for e in again.metadata if not e.key.startswith(loose or ("\0",))}
    theirs = {
        k: e
        for k, e in file.entries.items()
        if k not in skipped and not k.startswith(loose or ("\0",))
    }
    out = [
        f"{key}: {_change(theirs.get(key), ours.get(key))}"
        for key in dict.fromkeys((*theirs, *ours))
        if not _equal(theirs.get(key), ours.get(key))
    ]
    if exact and not out and list(ours) != list(theirs):
        out.append("the metadata keys come in another order")
    if exact:
        before = [(i.name, i.shape, i.type.name) for i in file.tensors.values()]
        after = [(t.name, t.shape, t.type.name) for t in again.tensors]
        if before != after:
            changed = {n for n, *_ in set(before) ^ set(after)}
            out += [f"tensor {n}: has another type" for n in sorted(changed)]
            out += [] if changed else ["the tensors come in another order"]
    return tuple(out)


def _equal(a: Any, b: Any) -> bool:
    if a is None or b is None or (a.type, a.items) != (b.type, b.items):
        return False
    if a.items is None:
        return bool(
            np.float32(a.value) == np.float32(b.value)
            if a.type.name == "F32"
            else a.value == b.value
        )
    return len(a.value) == len(b.value) and all(
        x == y for x, y in zip(a.value, b.value, strict=True)
    )


def _change(a: Any, b: Any) -> str:
    if a is None or b is None:
        return "would be gone" if b is None else "would be added"
    if a.items is not None or b.items is not None:
        return "would differ"
    return f"would be {b.value!r}, is {a.value!r}"


def _provenance(file: GgufFile, dtype: str | None) -> dict[str, Any]:
    source = {"path": str(file.paths[0]), "format": "gguf", "files": len(file.paths)}
    return {"mconv": __version__, "source": source, "dtype": dtype}
