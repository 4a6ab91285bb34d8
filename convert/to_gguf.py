"""``mconv.to_gguf``: any checkpoint to a GGUF file, in one streaming pass.

The file equals, tensor by tensor and key by key, what llama.cpp's converter writes from the merged
Hugging Face model. Everything that can be refused is refused before the first byte is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..shardio import Checkpoint, from_array
from ..shardio.staging import fingerprint, write_loose
from ..shardio.stream import Limits, Progress
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
    target = Path(out)
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; name the file, such as {target / 'model.gguf'}")
    folder = Path(tokenizer) if tokenizer is not None else None
    ckpt = opened(src, config)
    ready = prepare(ckpt, weights=weights, vocab_size=vocab_size, tokenizer=folder, verify=verify)
    architecture = find_architecture(ready.config)
    assert ready.config is not None
    full = complete_config(ready.config, architecture)
    mapped = _tensors(architecture, full, ready)
    kind = parse_type(type, mapped)
    planned = plan_tensors(mapped, kind)
    vocabulary = load_vocabulary(
        find_tokenizer(folder, ready.assets),
        architecture.tokenizer,
        ready.config,
        vocab_size=full["vocab_size"],
        pre=pre,
    )
    metadata = [
        *general_entries(
            architecture.name, model_folder(ready), [(t.name, t.shape) for t in planned], name
        ),
        *model_entries(architecture, full, FILE_TYPES[kind.name]),
        u32("general.quantization_version", _QUANTIZATION_VERSION),
        *vocabulary_entries(architecture.adjust_vocabulary(vocabulary, full)),
    ]
    file = plan_file(target.name, metadata, planned)
    if not dry_run:
        sources = {path for t in ckpt.weights.values() for path, _, _ in t.spans()}
        write_loose(
            target,
            [file],
            plan=fingerprint([file], sources, json.dumps([weights, kind.name])),
            force=force,
            resume=resume,
            limits=limits,
            progress=progress,
        )
    return GgufReport(
        target, architecture.name, kind.name, file.size, planned, metadata, tuple(ready.warnings)
    )


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
