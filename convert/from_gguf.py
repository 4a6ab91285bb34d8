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
from ..errors import ConfigError, MconvError
from ..shardio import Checkpoint, Layout, dtypes
from ..shardio.assets import find_assets, load_json
from ..shardio.safetensors_plan import plan_bytes, plan_json
from ..shardio.staging import fingerprint, write_folder
from ..shardio.stream import Limits, OutFile, Progress
from ..shardio.writers import Planned, get_writer
from .from_gguf_card import generation_config, model_card
from .from_gguf_model import FoundModel, find_model
from .from_gguf_tensors import main_dtype
from .gguf import GgufFile, open_gguf
from .gguf.files import SPLIT_KEYS
from .to_gguf import to_gguf
from .tokenizers.restore import restore_tokenizer
from .tokenizers.stored import stored_vocabulary
from .tokenizers.vocabulary import ID_KEYS

_CONFIG = "config.json"


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
        force, resume: replace an existing folder; continue an interrupted run.
        dry_run: plan and check everything, write nothing.
        limits, progress: memory and threads; called with (bytes done, bytes in all).

    Raises:
        MconvError: a damaged file, an unknown architecture, misfits; nothing is left behind.
    """
    file = open_gguf(src)
    wanted = dtypes.parse_cast(dtype) if dtype is not None else None
    model = find_model(file, wanted, _own_config(config))
    small, warnings = _small_files(file, model, tokenizer)
    ckpt = Checkpoint(
        path=Path(src), format="gguf", weights=model.restored.weights, config=model.config,
        warnings=tuple(warnings),
    )  # fmt: skip
    planned = get_writer("hf").plan(ckpt, Layout("hf", max_shard_size=max_shard_size))
    beside = [plan_bytes(name, data) for name, data in small.items()]
    files = [*planned.files, *beside, plan_json("mconv.json", _provenance(file, dtype))]
    exact = wanted is None and not model.restored.decoded
    report = FromGgufReport(
        source=file.paths[0],
        target=Path(dst),
        architecture=model.architecture.name,
        model=str(model.config["architectures"][0]),
        dtype=dtypes.name(wanted if wanted is not None else main_dtype(file)),
        files={f.name: f.size for f in files},
        tensors=len(ckpt.weights),
        parameters=ckpt.num_parameters,
        differences=_what_differs(ckpt, file, planned, small, Path(dst).name, exact=exact),
        warnings=(*warnings, *planned.warnings),
    )
    if not dry_run:
        write_folder(
            report.target, files, plan=fingerprint(files, file.paths, json.dumps([dtype])),
            sources=file.paths, force=force, resume=resume, limits=limits, progress=progress,
        )  # fmt: skip
    return report


def _own_config(path: str | Path | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    found = load_json(Path(path) / _CONFIG if Path(path).is_dir() else Path(path))
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return found


def _small_files(
    file: GgufFile, model: FoundModel, tokenizer: str | Path | None
) -> tuple[dict[str, bytes], list[str]]:
    """Return the files beside the weights, and warnings."""
    warnings = []
    if model.restored.decoded:
        warnings.append(
            f"tensors of {', '.join(model.restored.decoded)} are decoded: what quantization "
            "rounded away does not come back"
        )
    if tokenizer is not None:
        folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
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


def _what_differs(
    ckpt: Checkpoint,
    file: GgufFile,
    planned: Planned,
    small: Mapping[str, bytes],
    name: str,
    *,
    exact: bool,
) -> tuple[str, ...]:
    """Put the small files into a folder of the model's name and plan it as a GGUF file."""
    config = next(f for f in planned.files if f.name == _CONFIG)
    texts = {**small, _CONFIG: _content(config)}
    with tempfile.TemporaryDirectory(prefix="mconv-from-gguf-") as scratch:
        folder = Path(scratch) / (name or "model")
        folder.mkdir()
        for text, data in texts.items():
            (folder / text).write_bytes(data)
        found = replace(ckpt, path=folder, assets=find_assets([folder]))
        return _differences(found, file, exact=exact)


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
