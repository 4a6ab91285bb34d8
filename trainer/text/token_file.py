"""Files of tokens: ``NAME.npy`` or ``NAME.bin``, mapped, and what is known about them beside it.

``NAME.json`` says dtype, tokenizer and counts; ``NAME.starts.npy`` (int64 [documents]) where
documents start; ``NAME.learned.npy`` (uint8 [tokens]) which tokens are learned, where not all are.
A bare ``.npy`` of uint16 or uint32 is enough; a bare ``.bin`` is uint16, as nanoGPT writes it, and
one with a ``.idx`` beside it Megatron's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import FormatError
from ...shardio.assets import load_json
from .megatron_tokens import read_index

#: Ids of a document, and which of them are learned (None: all).
Encoded = tuple[np.ndarray, np.ndarray | None]

_HEADER = 128  # bytes of our .npy header: room for any length
_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TokenFile:
    """Mapped tokens, and what ``NAME.json`` says about them."""

    path: Path
    tokens: np.ndarray  # uint16 or uint32 [n]
    starts: np.ndarray | None = None  # int64 [documents], rising from 0; None when unknown
    learned: np.ndarray | None = None  # uint8 [n], 1 where to be predicted; None: everywhere
    about: Mapping[str, Any] = field(default_factory=dict)

    def largest(self) -> int:
        """Return the largest id."""
        known = self.about.get("largest")
        return known if isinstance(known, int) else int(self.tokens.max(initial=0))

    def fingerprint(self) -> str:
        """Return a digest: sizes, and pieces spread over all arrays (a file may be huge)."""
        digest = blake2b(digest_size=16)
        for array in (self.tokens, self.starts, self.learned):
            if array is None:
                digest.update(b"none")
                continue
            digest.update(f"{array.dtype} {array.size}".encode())
            piece = _SAMPLE_BYTES // array.itemsize
            last = max(0, array.size - piece)
            for at in sorted({last * i // _SAMPLES for i in range(_SAMPLES + 1)}):
                digest.update(array[at : at + piece].tobytes())
        return digest.hexdigest()


def open_token_file(path: Path) -> TokenFile:
    """Open a token file, or that of a folder written by ``mconv tokenize``.

    Raises:
        FormatError: not a row of uint16 or uint32, or files beside it that do not fit.
    """
    path = path / "tokens.npy" if path.is_dir() else path
    beside = path.with_suffix(".json")
    about = load_json(beside) if beside.is_file() else {}
    if not isinstance(about, dict):
        raise FormatError(f"{beside}: expected a JSON object")
    starts, learned = (_beside(path, name) for name in ("starts", "learned"))
    try:
        if path.suffix == ".bin":
            kind = np.dtype(str(about.get("dtype", "uint16")))
            if path.with_suffix(".idx").is_file():
                kind, starts = read_index(path.with_suffix(".idx"), path.stat().st_size)
            tokens = np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
        else:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{path}: cannot be read as a token file ({error})") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise FormatError(
            f"{path}: holds {tokens.dtype} {list(tokens.shape)}, not a row of uint16 or uint32"
        )
    if starts is not None and (
        starts.dtype != np.int64 or not len(starts) or starts[0] or starts[-1] >= len(tokens)
    ):
        raise FormatError(f"{path}: .starts.npy is not of this file; make both again")
    if learned is not None and learned.shape != tokens.shape:
        raise FormatError(f"{path}: .learned.npy has {learned.size} entries, not {tokens.size}")
    return TokenFile(path, tokens, starts, learned, about)


def write_tokens(path: Path, tokens: np.ndarray) -> None:
    """Write bare token ids as uint16 when they fit, else as uint32."""
    small = tokens.size == 0 or int(tokens.max()) <= np.iinfo(np.uint16).max
    np.save(path, tokens.astype(np.uint16 if small else np.uint32))


def write_token_folder(
    folder: Path, documents: Iterable[Encoded], vocab_size: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write ``tokens.npy`` and what belongs to it, one document at a time; return what is said.

    Args:
        folder: there already; the caller renames it when all is done.
        documents: ids and what is learned of them; empty ones are left out.
        vocab_size: chooses between uint16 and uint32.
        about: goes into ``tokens.json``.
    """
    kind = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    starts: list[int] = []
    count = largest = learned = 0
    flags = folder / "tokens.learned.npy"
    with (folder / "tokens.npy").open("w+b") as ids, flags.open("w+b") as marks:
        for file in (ids, marks):
            file.write(bytes(_HEADER))
        for row, known in documents:
            if not len(row):
                continue
            starts.append(count)
            count += len(row)
            largest = max(largest, int(row.max()))
            ids.write(row.astype(kind).tobytes())
            said = np.ones(len(row), np.uint8) if known is None else known.astype(np.uint8)
            learned += int(said.sum())
            marks.write(said.tobytes())
        _finish_npy(ids, kind, count)
        _finish_npy(marks, np.dtype(np.uint8), count)
    if learned == count:
        flags.unlink()
    np.save(folder / "tokens.starts.npy", np.array(starts, np.int64))
    made = {
        "format": "mconv-tokens",
        "version": 1,
        "dtype": kind.name,
        "tokens": count,
        "learned": learned,
        "documents": len(starts),
        "largest": largest,
        **about,
    }
    (folder / "tokens.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return made


def _beside(path: Path, name: str) -> np.ndarray | None:
    file = path.with_suffix(f".{name}.npy")
    if not file.is_file():
        return None
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: cannot be read ({error})") from error
    return array if array.ndim == 1 else array.reshape(-1)


def _finish_npy(file: BinaryIO, kind: np.dtype, count: int) -> None:
    """Write the header of a row of ``count`` values over the room left for it."""
    said = f"{{'descr': '{kind.str}', 'fortran_order': False, 'shape': ({count},), }}"
    text = said.ljust(_HEADER - 11) + "\n"
    file.seek(0)
    file.write(b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + text.encode())
