"""Importance matrices: the mean squared activation per input column, measured on real text.

Formats of llama.cpp's ``llama-imatrix``: GGUF (``general.type`` = ``imatrix``, tensors
``NAME.in_sum2`` and ``NAME.counts``, one row per expert) and the older ``.dat`` (names with sums
already divided by their counts). Both become float32 [matrices, columns] per weight.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import ConfigError, FormatError
from .gguf import GgufFile, open_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_MAX_NAME = 4096  # bytes; longer means that the file is something else


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Importance per weight.

    Attributes:
        path: where it was read from.
        entries: weight name to float32 [values]: columns, matrix after matrix.
        datasets: the texts it was measured on.
        chunks: number of text chunks, 0 if unknown.
    """

    path: Path
    entries: Mapping[str, np.ndarray]
    datasets: tuple[str, ...] = ()
    chunks: int = 0

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def selected(
        self, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> ImportanceMatrix:
        """Return the matrix with only some entries.

        Args:
            include: keep entries whose name contains one of these (all if empty).
            exclude: drop entries whose name contains one of these.

        Raises:
            ConfigError: both are given, or one of them is found in no entry's name.
        """
        if include and exclude:
            raise ConfigError("--include-weights and --exclude-weights exclude each other")
        for part in (*include, *exclude):
            if not any(part in name for name in self.entries):
                raise ConfigError(
                    f"{self.path}: no entry's name contains {part!r}; {self._sample()}"
                )
        kept = {
            name: values
            for name, values in self.entries.items()
            if (not include or any(part in name for part in include))
            and not any(part in name for part in exclude)
        }
        return replace(self, entries=kept)

    def weights(self, name: str, shape: Sequence[int]) -> np.ndarray | None:
        """Return float32 [matrices, columns] for a tensor, or None when it has no entry.

        Args:
            name: the tensor (of the model that the matrix was measured on).
            shape: row-major; dims before the last two count matrices (experts).

        Raises:
            FormatError: the entry's size does not fit the shape.
        """
        values = self.entries.get(name)
        if values is None:
            return None
        cols = shape[-1]
        matrices = int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1
        if values.size != cols * matrices:
            raise FormatError(
                f"{self.path}: the entry of {name!r} has {values.size} values, but the tensor has "
                f"{self._wanted(cols, matrices)}; {_explain(values.size, cols, matrices)}"
            )
        return values.reshape(matrices, cols)

    @staticmethod
    def _wanted(cols: int, matrices: int) -> str:
        return f"{matrices} matrices of {cols} columns" if matrices > 1 else f"{cols} columns"

    def _sample(self) -> str:
        names = list(self.entries)[:3]
        return f"it has {len(self.entries)} entries, such as {', '.join(names) or '(none)'}"

    def mismatch(self, names: Sequence[str]) -> str | None:
        """Say what is wrong when the matrix covers none of a model's tensors, else None."""
        if any(name in self.entries for name in names):
            return None
        return (
            f"{self.path}: no entry belongs to a tensor of this model ({self._sample()}); "
            "it was made for another model, or with other tensor names"
        )


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix, GGUF or ``.dat``.

    Raises:
        FormatError: not an importance matrix, truncated, or with values that are negative or not
            finite.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    matrix = _from_gguf(open_gguf(path), path) if magic == b"GGUF" else _from_dat(path)
    if not matrix.entries:
        raise FormatError(f"{path}: holds no importance data")
    for name, values in matrix.entries.items():
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise FormatError(
                f"{path}: the entry of {name!r} has values that are negative or not finite; "
                "measure it again"
            )
    return matrix


def _from_gguf(file: GgufFile, path: Path) -> ImportanceMatrix:
    if file.get("general.type") != "imatrix" and not all(key in file for key in _KEYS):
        raise FormatError(
            f"{path}: is a GGUF file of type {file.get('general.type')!r}, not an importance "
            "matrix; make one with llama-imatrix"
        )
    missing = [key for key in _KEYS if key not in file]
    if missing:
        raise FormatError(f"{path}: the metadata lacks {', '.join(missing)}")
    entries: dict[str, np.ndarray] = {}
    names = {n.removesuffix(_SUMS) for n in file.tensors if n.endswith(_SUMS)}
    counted = {n.removesuffix(_COUNTS) for n in file.tensors if n.endswith(_COUNTS)}
    if names != counted:
        lonely = sorted(names ^ counted)[0]
        raise FormatError(f"{path}: {lonely!r} has {_SUMS} or {_COUNTS}, but not both")
    for name in sorted(names):
        sums = file.array(name + _SUMS).astype(np.float32).reshape(-1)
        counts = np.rint(file.array(name + _COUNTS).astype(np.float32).reshape(-1))
        if not counts.size or sums.size % counts.size:
            raise FormatError(
                f"{path}: {name!r} has {sums.size} sums for {counts.size} counts; damaged"
            )
        entries[name] = _means(sums.reshape(counts.size, -1), counts)
    return ImportanceMatrix(
        path, entries, tuple(file["imatrix.datasets"]), int(file["imatrix.chunk_count"])
    )


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Divide; an expert that no token reached weighs all its columns alike."""
    seen = (counts > 0)[:, None]
    divisor = np.where(seen, counts[:, None], np.float32(1))
    return np.where(seen, sums / divisor, np.float32(1)).astype(np.float32).reshape(-1)


class _Reader:
    """Little-endian fields of a ``.dat`` file."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, nbytes: int, what: str) -> bytes:
        if not 0 <= nbytes <= self.left:
            raise FormatError(
                f"{self.path}: {what} claims {nbytes} bytes at byte {self.at}, {self.left} are "
                "left; the file is truncated, or not an importance matrix"
            )
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])


def _from_dat(path: Path) -> ImportanceMatrix:
    reader = _Reader(path)
    count = reader.number("the number of entries")
    if not 0 < count <= reader.left // 12:
        raise FormatError(
            f"{path}: claims {count} entries in {reader.left} bytes; not an importance matrix"
        )
    entries: dict[str, np.ndarray] = {}
    for index in range(count):
        length = reader.number(f"entry {index}")
        if length > _MAX_NAME:
            raise FormatError(f"{path}: entry {index} has a name of {length} bytes; damaged")
        name = reader.take(length, f"the name of entry {index}").decode("utf-8", "replace")
        calls = reader.number(f"entry {name!r}")
        size = reader.number(f"entry {name!r}")
        if size < 1:
            raise FormatError(f"{path}: entry {name!r} has {size} values; damaged")
        values = np.frombuffer(reader.take(4 * size, f"entry {name!r}"), "<f4").astype(np.float32)
        entries[name] = values / np.float32(calls) if calls > 0 else values
    chunks = reader.number("the chunk count") if reader.left else 0
    length = reader.number("the dataset's name") if reader.left else 0
    datasets = [reader.take(length, "the dataset's name").decode("utf-8", "replace")]
    return ImportanceMatrix(path, entries, tuple(d for d in datasets if d), chunks)


def _explain(size: int, cols: int, matrices: int) -> str:
    if matrices > 1 and size == cols:
        return (
            "it was measured without telling experts apart, by an old llama-imatrix or on a file "
            "with one tensor per expert: measure it again"
        )
    if size % cols == 0 and size != cols:
        return f"it is for {size // cols} experts: it was made for another model"
    return "it was made for another model"
