"""``mconv.to_gguf``: any checkpoint to a GGUF file, in one streaming pass.

The file equals, tensor by tensor and key by key, what llama.cpp's converter writes from the merged
Hugging Face model. Everything that can be refused is refused before the first byte is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..shardio import Checkpoint, from_array
from ..shardio.payload import BytesPayload
from ..shardio.staging import fingerprint, write_loose
from ..shardio.stream import Limits, OutFile, Progress
from .architectures import (
    Architecture,
    MappedTensor,
    complete_config,
    find_architecture,
    map_tensors,
    model_entries,
)
from .general import general_entries
from .gguf import KeyValue
from .gguf.values import u32
from .gguf_plan import FILE_TYPES, PlannedTensor, parse_type, plan_file, plan_tensors
from .prepare import prepare
from .reshard import opened
from .tokenizers import find_tokenizer, load_vocabulary, vocabulary_entries

_QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class GgufReport:
    """What was written, or would be.

    Attributes:
        target: the file.
        architecture: ``general.architecture``.
        type: the type asked for.
        nbytes: size of the file.
        tensors: every tensor with its type and size.
        metadata: every metadata entry.
        warnings: what a user should know.
    """

    target: Path
    architecture: str
    type: str
    nbytes: int
    tensors: Sequence[PlannedTensor]
    metadata: Sequence[KeyValue]
    warnings: tuple[str, ...]


def to_gguf(
    src: Checkpoint | str | Path,
    out: str | Path,
    type: str = "f16",
    *,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    name: str | None = None,
    pre: str | None = None,
    weights: str = "model",
    vocab_size: int | None = None,
    verify: bool = True,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> GgufReport:
    """Write a checkpoint as a GGUF file.

    Args:
        src: an opened checkpoint or its path, of any format and layout.
        out: the file to write.
        type: ``f32``, ``f16``, ``bf16``, ``q8_0`` or ``auto`` (the weights' own 16-bit type).
        tokenizer: folder with the tokenizer; by default the checkpoint's own.
        config: config.json or model folder, where the checkpoint has none.
        name: the model's name in the metadata; by default from its folder or model card.
        pre: llama.cpp's name of the pre-tokenizer, instead of the recognized one.
        weights: ``model`` or ``master`` (the optimizer's fp32 copies).
        vocab_size: true vocabulary size where the checkpoint's embedding is padded.
        verify: compare replicas and sample master copies before writing.
        force: replace an existing file.
        resume: continue an interrupted run.
        dry_run: plan and prove everything, write nothing.
        limits: memory and threads.
        progress: called with (bytes done, bytes in all).

    Returns:
        What was (or would be) written.

    Raises:
        MconvError: any bad input, impossible request or full disk; nothing is left behind.
    """
    target, folder = Path(out), Path(tokenizer) if tokenizer is not None else None
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; name the file, such as {target / 'model.gguf'}")
    ckpt = opened(src, config)
    ready = prepare(ckpt, weights=weights, vocab_size=vocab_size, tokenizer=folder, verify=verify)
    report = _plan(ready, target, type, folder, name, pre)
    if not dry_run:
        file = plan_file(target.name, report.metadata, report.tensors)
        sources = {path for t in ckpt.weights.values() for path, _, _ in t.spans()}
        plan = fingerprint([file], sources, json.dumps([weights, _digest(file)]))
        write_loose(
            target,
            [file],
            plan=plan,
            force=force,
            resume=resume,
            limits=limits,
            progress=progress,
        )
    return report


def _plan(
    ckpt: Checkpoint,
    target: Path,
    type: str,
    tokenizer: Path | None,
    name: str | None,
    pre: str | None,
) -> GgufReport:
    """Decide everything about the file; ``ckpt`` has Hugging Face names."""
    architecture = find_architecture(ckpt.config)
    assert ckpt.config is not None
    config = complete_config(ckpt.config, architecture)
    mapped = _tensors(architecture, config, ckpt)
    kind = parse_type(type, mapped)
    planned = plan_tensors(mapped, kind)
    vocabulary = load_vocabulary(
        find_tokenizer(tokenizer, ckpt.assets),
        architecture.tokenizer,
        ckpt.config,
        vocab_size=config["vocab_size"],
        pre=pre,
    )
    shapes = [(t.name, t.shape) for t in planned]
    metadata = [
        *general_entries(architecture.name, model_folder(ckpt), shapes, name),
        *model_entries(architecture, config, FILE_TYPES[kind.name]),
        u32("general.quantization_version", _QUANTIZATION_VERSION),
        *vocabulary_entries(architecture.adjust_vocabulary(vocabulary, config)),
    ]
    return GgufReport(
        target=target,
        architecture=architecture.name,
        type=kind.name,
        nbytes=plan_file(target.name, metadata, planned).size,
        tensors=planned,
        metadata=metadata,
        warnings=tuple(ckpt.warnings),
    )


def _digest(file: OutFile) -> str:
    """Return the digest of the header, so that a resumed run has the same metadata."""
    header = file.parts[0][1]
    assert isinstance(header, BytesPayload)
    return hashlib.sha256(header.data).hexdigest()


def model_folder(ckpt: Checkpoint) -> Path:
    """Return the folder a model is named after: the one of its config.json, else its own."""
    configs = [path.parent for path in ckpt.assets if path.name == "config.json"]
    folder = configs[0] if configs else ckpt.path
    return (folder if folder.is_dir() else folder.parent).resolve()


def _tensors(
    architecture: Architecture, config: dict[str, Any], ckpt: Checkpoint
) -> list[MappedTensor]:
    """Return the computed tensors, then those of the checkpoint."""
    extra = []
    for one in architecture.extra_tensors:
        values = one.build(config)
        if values is not None:
            extra.append(MappedTensor(one.gguf, "(computed)", from_array(values), True))
    return extra + map_tensors(architecture, config, ckpt.weights, ckpt.tied)
