"""CRC-32C (Castagnoli), and the masked form in which LevelDB and TensorFlow store it.

Long data is cut into lanes that are taken byte by byte at once, and then joined: the state after
``A`` and ``B`` is that of ``A`` moved over ``len(B)`` zeros, xor that of ``B``; moving is linear
over GF(2). Source: RFC 3720 appendix B.4, LevelDB ``crc32c.h``, zlib ``crc32_combine``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_START = 0xFFFFFFFF
_LANES = 4096  # a power of two
_LONG = 64 << 10  # bytes from which lanes are worth it


@lru_cache(maxsize=1)
def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def crc32c(data: bytes | memoryview, before: int = 0) -> int:
    """Return the checksum of the bytes; ``before`` is that of the bytes in front of them."""
    state = before ^ _START
    if len(data) >= _LONG:
        width = len(data) // _LANES
        state = _lanes(np.frombuffer(data, np.uint8, width * _LANES).reshape(_LANES, width), state)
        data = data[width * _LANES :]
    table = _table()
    for byte in data:
        state = (state >> 8) ^ table[(state ^ byte) & 0xFF]
    return state ^ _START


def _lanes(data: np.ndarray, state: int) -> int:
    table = np.array(_table(), np.uint32)
    states = np.zeros(len(data), np.uint32)
    for column in np.ascontiguousarray(data.T):
        states = (states >> np.uint32(8)) ^ table[(states ^ column) & np.uint32(0xFF)]
    move = _zeros(data.shape[1])
    whole = np.array([state], np.uint32)
    while len(states) > 1:
        states = _apply(move, states[0::2]) ^ states[1::2]
        move = _apply(move, move)
    return int((_apply(move, whole) ^ states)[0])


def _zeros(count: int) -> np.ndarray:
    """Return the map of a state over ``count`` zero bytes: what becomes of each of its 32 bits."""
    table = _table()
    bits = [1 << b for b in range(32)]
    step = np.array([(b >> 8) ^ table[b & 0xFF] for b in bits], np.uint32)
    whole = np.array(bits, np.uint32)
    while count:
        if count & 1:
            whole = _apply(step, whole)
        step = _apply(step, step)
        count >>= 1
    return whole


def _apply(move: np.ndarray, states: np.ndarray) -> np.ndarray:
    out = np.zeros_like(states)
    for bit, image in enumerate(move):
        out ^= ((states >> np.uint32(bit)) & np.uint32(1)) * image
    return out


def masked(crc: int) -> int:
    """Return the stored form: rotated and shifted, so that checksums of checksums differ."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
