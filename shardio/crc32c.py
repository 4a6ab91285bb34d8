"""CRC-32C (Castagnoli), and the masked form in which LevelDB and TensorFlow store it.

Source: RFC 3720 appendix B.4, LevelDB ``crc32c.h``. Plain Python: meant for indexes of some 100 kB.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8


@lru_cache(maxsize=1)
def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """Return the checksum of the bytes."""
    table = _table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """Return the stored form: rotated and shifted, so that checksums of checksums differ."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
