"""Planning a PyTorch distributed checkpoint: ``.metadata`` and ``__<rank>_0.distcp`` files.

After ``torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py`` (torch 2.4 to 2.13):
each item is a ``torch.save`` archive, the metadata a pickle of plain dataclasses, named here
without importing torch. ``planner_data`` tells the path of every flat key in the nested dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .box import Box, Index, extent
from .chunk_grid import cells
from .dcp_metadata import METADATA, KeyPath
from .payload import BytesPayload, Payload
from .pickle_write import Call, Instance, Name, Pairs, dumps, torch_size
from .stream import OutFile
from .tensor import LazyTensor
from .torchzip_plan import Archive, plan_archive, plan_item

_META = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"

_Index = tuple[str, Index | None, int | None]  # key, first index of the box, its number

Piece = tuple[int, Index, LazyTensor]  # rank, first index in the whole tensor, data


@dataclass(slots=True)
class _RankFile:
    """One ``.distcp``: items one after the other."""

    name: str
    size: int = 0
    parts: list[tuple[int, Payload]] = field(default_factory=list)

    def add(self, archive: Archive) -> tuple[int, int]:
        """Append an item; returns (offset, length)."""
        start = self.size
        self.parts += [(start + at, payload) for at, payload in archive.parts]
        self.size += archive.size
        return start, archive.size


@dataclass(slots=True)
class DcpPlan:
    """A checkpoint being laid out on a dp x tp mesh.

    Attributes:
        tp, dp: mesh sizes; rank = dp index * tp + tp index.
    """

    tp: int
    dp: int
    _files: dict[int, _RankFile] = field(default_factory=dict)
    _entries: dict[str, Any] = field(default_factory=dict)
    _storage: list[tuple[_Index, int, int, int]] = field(default_factory=list)
    _paths: dict[str, KeyPath] = field(default_factory=dict)

    def tensor(self, path: KeyPath, tensor: LazyTensor, cut_as: str) -> None:
        """Add a tensor.

        Args:
            path: place in the nested state dict.
            tensor: the whole of it.
            cut_as: parameter name that tells how tensor parallel cuts it.
        """
        turn = len(self._entries)
        found = []
        for cell in cells(cut_as, tensor.shape, tp=self.tp, dp=self.dp, turn=turn):
            region = [slice(a, b) for a, b in zip(cell.lo, cell.hi, strict=True)]
            found.append((cell.rank, cell.lo, tensor.slice(region)))
        self.pieces(path, tensor.shape, tensor.dtype, found)

    def pieces(self, path: KeyPath, shape: Index, dtype: np.dtype, pieces: Iterable[Piece]) -> None:
        """Add a tensor that is cut already.

        Args:
            path: place in the nested state dict.
            shape, dtype: of the whole tensor.
            pieces: (rank, first index in the whole, piece); they tile it.
        """
        key = self._key(path)
        boxes: list[Box] = []
        for k, (rank, lo, piece) in enumerate(pieces):
            boxes.append((lo, tuple(a + n for a, n in zip(lo, piece.shape, strict=True))))
            self._store(rank, (key, lo, k), plan_item(piece))
        self._entries[key] = Instance(
            Name(_META, "TensorStorageMetadata"),
            {
                "properties": _properties(dtype),
                "size": torch_size(shape),
                "chunks": _Chunks(boxes),
            },
        )

    def value(self, path: KeyPath, value: Any) -> None:
        """Add plain data as a leaf of its own."""
        key = self._key(path)
        self._entries[key] = Instance(Name(_META, "BytesStorageMetadata"))
        self._store(0, (key, None, None), plan_archive(value))

    def tree(self, path: KeyPath, values: Mapping[str, Any]) -> None:
        """Add nested plain data, one leaf per value, as DCP flattens mappings."""
        for inner, value in _leaves(path, values):
            self.value(inner, value)

    def files(self) -> list[OutFile]:
        """Every file, metadata last."""
        metadata = Instance(
            Name(_META, "Metadata"),
            {
                "state_dict_metadata": self._entries,
                "planner_data": self._paths,
                "storage_data": Pairs(map(_place, self._storage)),
                "storage_meta": None,
                "version": _VERSION,
            },
        )
        found = [OutFile(f.name, f.size, tuple(f.parts)) for _, f in sorted(self._files.items())]
        data = dumps(metadata, _lower)
        return [*found, OutFile(METADATA, len(data), ((0, BytesPayload(data)),))]

    def _key(self, path: KeyPath) -> str:
        key = ".".join(map(str, path))
        assert key not in self._entries, f"{key} is planned twice"
        self._paths[key] = path
        return key

    def _store(self, rank: int, index: _Index, archive: Archive) -> None:
        file = self._files.setdefault(rank, _RankFile(f"__{rank}_0.distcp"))
        self._storage.append((index, rank, *file.add(archive)))


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The boxes of a tensor, kept small until they are written."""

    boxes: list[Box]


def _lower(value: Any) -> Any:
    assert isinstance(value, _Chunks)
    return [_chunk(lo, extent((lo, hi))) for lo, hi in value.boxes]


def _place(item: tuple[_Index, int, int, int]) -> tuple[Instance, Instance]:
    """Where an item lies: MetadataIndex to _StorageInfo."""
    (key, lo, number), rank, start, length = item
    index = {"fqn": key, "offset": None if lo is None else torch_size(lo), "index": number}
    info = {"relative_path": f"__{rank}_0.distcp", "offset": start, "length": length}
    place = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    return Instance(Name(_META, "MetadataIndex"), index), Instance(place, info)


def _leaves(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves((*path, key), inner)
    else:
        yield path, value


def _chunk(lo: Index, sizes: Index) -> Instance:
    fields = {"offsets": torch_size(lo), "sizes": torch_size(sizes)}
    return Instance(Name(_META, "ChunkStorageMetadata"), fields)


def _properties(dtype: np.dtype) -> Instance:
    strided = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Name(_META, "_MEM_FORMAT_ENCODING"), (0,))
    return Instance(Name(_META, "TensorProperties"), (dtype, strided, False, contiguous, False))
