"""Every ggml tensor type: name, id, block shape and what it needs, in one table.

A quantized tensor is a sequence of blocks along its last axis; a block of ``block`` elements takes
``bytes`` bytes. Source of the format: ggml's ``enum ggml_type`` and block structures (GGUF v3).
Types marked ``storable=False`` are intermediate activation formats that never appear in a file
that loads. ``needs_importance`` means that the encoder is undefined without an importance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import QuantError, did_you_mean


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One ggml tensor type.

    Attributes:
        name: the ggml name, such as ``"Q4_K"``.
        id: the number stored in a GGUF tensor header.
        block: elements per block (1 for plain numbers).
        bytes: bytes per block.
        kind: ``float``, ``int``, ``legacy``, ``k``, ``iq``, ``ternary``, ``fp4`` or ``low``.
        needs_importance: quantizing requires an importance vector.
        storable: a loader accepts the type in a model file.
    """

    name: str
    id: int
    block: int
    bytes: int
    kind: str
    needs_importance: bool = False
    storable: bool = True

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return self.bytes * 8 / self.block

    @property
    def is_quantized(self) -> bool:
        """True for block formats, false for plain floats and integers."""
        return self.block > 1

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of one row of ``cols`` elements.

        Raises:
            QuantError: ``cols`` is not a multiple of the block size.
        """
        if cols % self.block:
            raise QuantError(
                f"{self.name} packs {self.block} elements per block, but a row has {cols}: "
                f"choose a type whose block divides {cols}"
            )
        return cols // self.block * self.bytes


_TABLE = (
    #        name      id  block bytes kind
    GgmlType("F32", 0, 1, 4, "float"),
    GgmlType("F16", 1, 1, 2, "float"),
    GgmlType("BF16", 30, 1, 2, "float"),
    GgmlType("F64", 28, 1, 8, "float"),
    GgmlType("I8", 24, 1, 1, "int"),
    GgmlType("I16", 25, 1, 2, "int"),
    GgmlType("I32", 26, 1, 4, "int"),
    GgmlType("I64", 27, 1, 8, "int"),
    GgmlType("Q4_0", 2, 32, 18, "legacy"),
    GgmlType("Q4_1", 3, 32, 20, "legacy"),
    GgmlType("Q5_0", 6, 32, 22, "legacy"),
    GgmlType("Q5_1", 7, 32, 24, "legacy"),
    GgmlType("Q8_0", 8, 32, 34, "legacy"),
    GgmlType("Q8_1", 9, 32, 36, "legacy", storable=False),
    GgmlType("Q2_K", 10, 256, 84, "k"),
    GgmlType("Q3_K", 11, 256, 110, "k"),
    GgmlType("Q4_K", 12, 256, 144, "k"),
    GgmlType("Q5_K", 13, 256, 176, "k"),
    GgmlType("Q6_K", 14, 256, 210, "k"),
    GgmlType("Q8_K", 15, 256, 292, "k", storable=False),
    GgmlType("IQ1_S", 19, 256, 50, "iq", needs_importance=True),
    GgmlType("IQ1_M", 29, 256, 56, "iq"),
    GgmlType("IQ2_XXS", 16, 256, 66, "iq", needs_importance=True),
    GgmlType("IQ2_XS", 17, 256, 74, "iq", needs_importance=True),
    GgmlType("IQ2_S", 22, 256, 82, "iq"),
    GgmlType("IQ3_XXS", 18, 256, 98, "iq"),
    GgmlType("IQ3_S", 21, 256, 110, "iq"),
    GgmlType("IQ4_NL", 20, 32, 18, "iq"),
    GgmlType("IQ4_XS", 23, 256, 136, "iq"),
    GgmlType("TQ1_0", 34, 256, 54, "ternary"),
    GgmlType("TQ2_0", 35, 256, 66, "ternary"),
    GgmlType("MXFP4", 39, 32, 17, "fp4"),
    GgmlType("NVFP4", 40, 64, 36, "fp4"),
    GgmlType("Q1_0", 41, 128, 18, "low"),
    GgmlType("Q2_0", 42, 64, 18, "low"),
)

TYPES: dict[str, GgmlType] = {t.name: t for t in _TABLE}
"""All types by ggml name."""

_BY_ID = {t.id: t for t in _TABLE}


def type_by_name(name: str | GgmlType) -> GgmlType:
    """Return the type called ``name`` (case does not matter; a ``GgmlType`` passes through).

    Raises:
        QuantError: there is no such type.
    """
    if isinstance(name, GgmlType):
        return name
    found = TYPES.get(name.upper())
    if found is None:
        hint = did_you_mean(name.upper(), TYPES) or f"; known types: {', '.join(TYPES)}"
        raise QuantError(f"unknown tensor type {name!r}{hint}")
    return found


def type_by_id(number: int) -> GgmlType:
    """Return the type with this ggml id.

    Raises:
        QuantError: the id is unknown, or belongs to a retired type.
    """
    found = _BY_ID.get(int(number))
    if found is None:
        raise QuantError(
            f"unknown ggml type id {number}: the file is newer than this version of mconv, "
            "uses a retired type, or is damaged"
        )
    return found
