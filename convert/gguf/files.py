"""Where tensors go: one GGUF file, or a split set of them with the tensor data cut by size.

Format of split sets: llama.cpp's ``gguf-split``. The first file carries the metadata, every file
``split.no``, ``split.count`` and ``split.tensors.count``, and they are called
``NAME-00001-of-00003.gguf``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...quant.types import type_by_id
from ...shardio.payload import BytesPayload, Payload
from ...shardio.stream import OutFile
from .endian import swapped
from .values import KeyValue, ValueType
from .writer import DEFAULT_ALIGNMENT, TensorSpec, build_header, padded

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor of the output: what the header says, and its bytes."""

    spec: TensorSpec
    payload: Payload


def plan_files(
    name: str,
    metadata: Sequence[KeyValue],
    shards: Sequence[Sequence[OutTensor]],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    big_endian: bool = False,
) -> list[OutFile]:
    """Return the files to be written.

    Args:
        name: file name; with several shards their numbers go before ``.gguf``.
        metadata: of the model, without split keys.
        shards: tensors per file, in order.
        alignment: of tensor data.
        big_endian: for machines of that kind.

    Raises:
        FormatError: metadata or a tensor that GGUF cannot hold.
        UnsupportedError: a type that big-endian files cannot hold.
    """
    if len(shards) == 1:
        return [_plan_file(name, metadata, shards[0], alignment, big_endian)]
    total = sum(len(shard) for shard in shards)
    files = []
    for number, shard in enumerate(shards):
        split = [
            KeyValue("split.no", ValueType.U16, number),
            KeyValue("split.count", ValueType.U16, len(shards)),
            KeyValue("split.tensors.count", ValueType.I32, total),
        ]
        entries = [*(metadata if number == 0 else ()), *split]
        part = shard_name(name, number, len(shards))
        files.append(_plan_file(part, entries, shard, alignment, big_endian))
    return files


def shard_name(name: str, number: int, count: int) -> str:
    """Return the file name of shard ``number`` (from 0) of ``count``."""
    stem = name[: -len(".gguf")] if name.endswith(".gguf") else name
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def cut_by_size(
    tensors: Sequence[OutTensor],
    limit: int | None,
    alignment: int = DEFAULT_ALIGNMENT,
    count: int | None = None,
) -> list[list[OutTensor]]:
    """Cut a list of tensors into shards of at most ``limit`` data bytes and ``count`` tensors.

    None means no limit. A tensor is never cut, so one that is larger than the limit gets a shard of
    its own.
    """
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for one in tensors:
        need = padded(one.spec.nbytes, alignment)
        full = (limit is not None and size + need > limit) or len(shards[-1]) == count
        if shards[-1] and full:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += need
    return shards


def _plan_file(
    name: str,
    metadata: Sequence[KeyValue],
    tensors: Sequence[OutTensor],
    alignment: int,
    big_endian: bool,
) -> OutFile:
    specs, payloads = [t.spec for t in tensors], [t.payload for t in tensors]
    if big_endian:
        payloads = [swapped(t.payload, type_by_id(t.spec.type_id), t.spec.name) for t in tensors]
    header = build_header(metadata, specs, alignment=alignment, big_endian=big_endian)
    parts: list[tuple[int, Payload]] = [(0, BytesPayload(header.data))]
    parts += zip(header.offsets, payloads, strict=True)
    return OutFile(name, header.file_size, tuple(parts))
