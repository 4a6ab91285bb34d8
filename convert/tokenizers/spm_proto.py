"""SentencePiece model files as protobuf messages: read what the library does not tell, write one.

Format: ``sentencepiece_model.proto`` of google/sentencepiece in the protobuf wire format (a key of
field number and wire type, then a varint, 4 or 8 bytes, or a length and bytes). Only the fields
named here are looked at; the file is untrusted, so every length is checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import FormatError

UNIGRAM, BPE = 1, 2
#: ``ModelProto``, ``SentencePiece``, ``TrainerSpec`` and ``NormalizerSpec`` field numbers.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
_PIECE_NAMES = {"unk": 45, "bos": 46, "eos": 47, "pad": 48}
_NAME, _CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE = 1, 2, 3, 4, 5
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_MOST_VARINT = 10


@dataclass(frozen=True, slots=True)
class SpmSettings:
    """What a model file says beside its pieces.

    Attributes:
        kind: ``UNIGRAM`` or ``BPE`` (others exist: word, char).
        add_prefix: a space is put before the text.
        remove_spaces: runs of spaces become one, those around the text none.
        charsmap: compiled normalization rules; empty: none.
    """

    kind: int = UNIGRAM
    add_prefix: bool = True
    remove_spaces: bool = True
    charsmap: bytes = b""


def read_settings(path: Path) -> SpmSettings:
    """Read the settings of a SentencePiece model.

    Raises:
        FormatError: the file cannot be read or is not such a model.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        kind, prefix, spaces, charsmap = UNIGRAM, True, True, b""
        for number, value in _fields(raw):
            if number == _TRAINER and isinstance(value, bytes):
                kind = int(dict(_fields(value)).get(_MODEL_TYPE, UNIGRAM))
            elif number == _NORMALIZER and isinstance(value, bytes):
                found = dict(_fields(value))
                prefix = bool(found.get(_DUMMY_PREFIX, True))
                spaces = bool(found.get(_EXTRA_SPACES, True))
                charsmap = bytes(found.get(_CHARSMAP, b""))
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: is not a SentencePiece model: {error}") from error
    return SpmSettings(kind, prefix, spaces, charsmap)


def write_model(
    pieces: Sequence[tuple[str, float, int]],
    settings: SpmSettings,
    ids: dict[str, int],
) -> bytes:
    """Return a model file.

    Args:
        pieces: text, score and type per id.
        settings: kind and normalization.
        ids: ids of ``unk``, ``bos``, ``eos`` and ``pad``; those absent do not exist.
    """
    out = bytearray()
    for text, score, kind in pieces:
        body = _bytes(_TEXT, text.encode()) + _key(_SCORE, _FOUR) + struct.pack("<f", score)
        out += _bytes(_PIECES, body + _number(_TYPE, kind))
    trainer = _number(_MODEL_TYPE, settings.kind) + _number(_VOCAB_SIZE, len(pieces))
    trainer += _number(_BYTE_FALLBACK, int(any(kind == 6 for _, _, kind in pieces)))
    for role, field in _IDS.items():
        trainer += _number(field, ids.get(role, -1))
        if role in ids:
            trainer += _bytes(_PIECE_NAMES[role], pieces[ids[role]][0].encode())
    normalizer = _bytes(_NAME, b"nmt_nfkc" if settings.charsmap else b"identity")
    normalizer += _bytes(_CHARSMAP, settings.charsmap)
    normalizer += _number(_DUMMY_PREFIX, int(settings.add_prefix))
    normalizer += _number(_EXTRA_SPACES, int(settings.remove_spaces)) + _number(_ESCAPE, 1)
    return bytes(out) + _bytes(_TRAINER, trainer) + _bytes(_NORMALIZER, normalizer)


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value); numbers of fixed width come as their bytes."""
    position = 0
    while position < len(raw):
        key, position = _varint(raw, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(raw, position)
            yield number, value
            continue
        if wire == _BYTES:
            length, position = _varint(raw, position)
        elif wire in (_FOUR, _EIGHT):
            length = 4 if wire == _FOUR else 8
        else:
            raise ValueError(f"unknown wire type {wire}")
        if length > len(raw) - position:
            raise ValueError("a field reaches past the end")
        yield number, raw[position : position + length]
        position += length


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for k in range(_MOST_VARINT):
        if position + k >= len(raw):
            break
        byte = raw[position + k]
        value |= (byte & 0x7F) << (7 * k)
        if byte < 0x80:
            return value, position + k + 1
    raise ValueError("a number does not end")


def _encode(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written in two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int, wire: int) -> bytes:
    return _encode(number << 3 | wire)


def _number(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _encode(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _encode(len(value)) + value
