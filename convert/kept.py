"""Which quantized weights go into a GGUF file as the blocks they are, and which are decoded.

MXFP4 and NVFP4 are ggml's own formats and always stay. Other codes stay where that is asked for
(the type ``keep``) and a block type holds them exactly. Tensors made of whole rows of others, be
they permuted, cut, fused or stacked, are made of their blocks in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from ..quant import type_by_name
from ..shardio import from_array
from ..shardio.dequant import Floats
from ..shardio.tensor import LazyTensor, concat
from .architectures import MappedTensor
from .gguf.tensors import BlockTensor
from .keep_blocks import Fit, blocks_as, factor_of, fitting


class Keep(Enum):
    """The output type that keeps the bits of quantized weights."""

    KEEP = 0


_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39}
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of the quantized weights of an output.

    Attributes:
        types: how many tensors are kept as each block type.
        decoded: (tensor, why) of those that are not.
    """

    types: dict[str, int]
    decoded: tuple[tuple[str, str], ...]

    def lines(self) -> tuple[str, ...]:
        """What to tell a user."""
        out = []
        if self.types:
            parts = ", ".join(f"{n} as {kind}" for kind, n in self.types.items())
            out.append(f"{sum(self.types.values())} quantized tensors keep their bits: {parts}")
        reasons: dict[str, list[str]] = {}
        for name, why in self.decoded:
            reasons.setdefault(why, []).append(name)
        for why, names in list(reasons.items())[:_SHOWN]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            out.append(f"{names[0]}{more}: decoded, {why}")
        if len(reasons) > _SHOWN:
            out.append(f"{len(reasons) - _SHOWN} more reasons why tensors are decoded (--json)")
        return tuple(out)


def own_formats(mapped: Sequence[MappedTensor]) -> list[MappedTensor]:
    """Return the tensors with MXFP4 and NVFP4 as blocks, NVFP4 first, as llama.cpp's converter.

    What a runtime multiplies NVFP4 with comes as tensors of its own, ``.scale`` of the weight and
    ``.input_scale`` of what it is multiplied with.
    """
    first: list[MappedTensor] = []
    rest: list[MappedTensor] = []
    for one in mapped:
        if not one.coded or not all(isinstance(t.codes, Floats) for t in one.coded):
            rest.append(one)
            continue
        kind = _common([fitting(t.codes) for t in one.coded]).types[:1]
        if not kind:
            rest.append(one)
            continue
        made = _as_blocks(one, kind[0])
        (first if kind[0] == "NVFP4" else rest).extend(made)
    return first + rest


def keeping(mapped: Sequence[MappedTensor]) -> tuple[list[MappedTensor], Kept]:
    """Return the tensors with blocks wherever a type holds them exactly; reads scales."""
    out: list[MappedTensor] = []
    decoded: list[tuple[str, str]] = []
    for one in mapped:
        if one.stored is not None or not one.coded:
            out.append(one)
            continue
        fit = _common([fitting(t.codes) for t in one.coded])
        if fit.types:
            out += _as_blocks(one, fit.types[0])
        else:
            decoded.append((one.name, fit.reason))
            out.append(one)
    return out, Kept(_types(out), tuple(decoded))


def stored_anyway(mapped: Sequence[MappedTensor]) -> Kept:
    """Return what is kept in every output type, and that the rest was not asked for."""
    why = "--type keep writes its own bits where a GGUF type holds them"
    decoded = tuple((m.name, why) for m in mapped if m.coded and m.stored is None)
    return Kept(_types(mapped), decoded)


def _types(mapped: Sequence[MappedTensor]) -> dict[str, int]:
    return dict(Counter(m.stored.kind.name for m in mapped if m.stored is not None).most_common())


def kept_file_type(mapped: Sequence[MappedTensor], base: int) -> int:
    """Return ``general.file_type``: of the blocks that hold most weights, else the base type's."""
    name = main_type(mapped, "")
    return _FILE_TYPES[name] if name else base


def main_type(mapped: Sequence[MappedTensor], base: str) -> str:
    """Return the type of the blocks that hold most weights, else the base type."""
    sizes: Counter[str] = Counter()
    for one in mapped:
        if one.stored is not None:
            sizes[one.stored.kind.name] += one.tensor.size
    return sizes.most_common(1)[0][0] if sizes else base


def _common(fits: Sequence[Fit]) -> Fit:
    """What holds all parts of a tensor."""
    for fit in fits:
        if not fit.types:
            return fit
    shared = [kind for kind in fits[0].types if all(kind in fit.types for fit in fits)]
    size = {kind: type_by_name(kind).bpw for kind in shared}
    reason = "" if shared else "its parts need different types"
    return Fit(tuple(sorted(shared, key=size.__getitem__)), reason)


def _as_blocks(one: MappedTensor, kind: str) -> list[MappedTensor]:
    """Return a tensor as blocks, and its factors."""
    assert one.move is not None
    rows = one.move([blocks_as(t.codes, kind, one.hf).blocks for t in one.coded])
    tensor = BlockTensor(rows, type_by_name(kind))
    assert tensor.shape == one.tensor.shape, (one.name, tensor.shape, one.tensor.shape)
    out = [replace(one, tensor=tensor, stored=tensor)]
    stem = one.name.removesuffix(".weight")
    factors = [factor_of(t.codes, kind) for t in one.coded]
    inputs = [t.codes.input_factor if isinstance(t.codes, Floats) else None for t in one.coded]
    for name, found in ((f"{stem}.scale", factors), (f"{stem}.input_scale", inputs)):
        vector = _factors(found)
        if vector is not None:
            out.append(MappedTensor(name, one.hf, vector, True))
    return out


def _factors(found: Sequence[LazyTensor | None]) -> LazyTensor | None:
    """Return the factors of all parts as a vector; None when they are (nearly) 1."""
    one = from_array(np.ones(1, np.float32))
    vector = concat([one if f is None else f for f in found])
    values = vector.read()
    near = 1e-6 if len(found) == 1 else 1e-5 + 1e-6  # as llama.cpp's converter
    return None if (np.abs(values - 1) <= near).all() else vector
