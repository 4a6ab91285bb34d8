"""The tensors of a GGUF model under their Hugging Face names: every line of a table undone.

Nothing is read but small float32 tensors, to see whether they are 16-bit numbers: GGUF keeps norms
and the like in float32 whatever the model was trained in, and they come back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import ConfigError, counted
from ..shardio.box import extent
from ..shardio.dtypes import is_float
from ..shardio.payload import row_slabs
from ..shardio.tensor import LazyTensor
from .architectures import (
    TRANSFORMS,
    Architecture,
    Line,
    Transform,
    dimensions,
    stacking,
    table_lines,
)
from .gguf import GgufFile
from .gguf.factors import factored_values, factors_beside
from .gguf.tensors import BlockTensor, GgufTensors

_FLOAT32 = np.dtype(np.float32)
_HALF: Mapping[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_DECODED = _HALF["BF16"]
#: Types whose values come back as they are.
PLAIN_FLOATS = ("F32", "F16", "BF16", "F64")
_SLAB = 4 << 20
_SHOWN = 10
_MXFP4 = "mxfp4"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a table makes of a GGUF file.

    Attributes:
        weights: tensors by Hugging Face name.
        problems: what does not fit, one line each; empty: everything does.
        packed: experts come as the 4-bit blocks that Hugging Face knows.
        decoded: types of tensors that were decoded.
    """

    weights: Mapping[str, LazyTensor]
    problems: tuple[str, ...] = ()
    packed: bool = False
    decoded: tuple[str, ...] = field(default=())


def main_dtype(file: GgufFile) -> np.dtype:
    """Return the dtype a model comes back in: that of its matrices, bfloat16 of quantized ones.

    MXFP4 does not count: experts come in it from the hub, whatever the other weights are.
    """
    kinds = [info.type.name for info in file.tensors.values() if len(info.shape) > 1]
    others = [kind for kind in kinds if kind != "MXFP4"]
    plain = bool(others) and all(kind in PLAIN_FLOATS for kind in others)
    return next((_HALF[k] for k in others if k in _HALF), _FLOAT32 if plain else _DECODED)


def restored_weights(
    architecture: Architecture, config: Mapping[str, Any], file: GgufFile, dtype: np.dtype | None
) -> Restored:
    """Bring the tensors of a file back.

    Args:
        architecture: the model family.
        config: its completed configuration.
        file: the open file.
        dtype: of all floating tensors; None: what they are stored in, blocks decoded to 16 bits.

    Returns:
        The tensors, or everything that does not fit.
    """
    computed = {one.gguf for one in architecture.extra_tensors}
    factors, beside = factors_beside(file)
    there = {n: i for n, i in file.tensors.items() if n not in computed and n not in beside}
    lines = table_lines(architecture, config, tied="output.weight" not in there)
    chosen, problems = _choose(lines, there, packed=dtype is None, file=file)
    used = {name for line in chosen for name in line.outputs}
    problems += [f"unknown: {name}" for name in there if name not in used]
    if problems:
        return Restored({}, tuple(problems))
    tensors, sizes = GgufTensors(file), dimensions(architecture, config)
    kind, weights = main_dtype(file), {}
    order = {name: place for place, name in enumerate(file.tensors)}
    for line in sorted(chosen, key=lambda line: order[line.outputs[0]]):
        how = line.rule.transform or stacking(line.rule.hf)
        blocks = any(isinstance(tensors.values(name), BlockTensor) for name in line.outputs)
        parts = _alike([factored_values(tensors, factors, name) for name in line.outputs])
        try:
            made = TRANSFORMS[how].undo(parts, sizes)
        except ValueError as error:
            problems.append(f"shape: {', '.join(line.outputs)}: {error}")
            continue
        if TRANSFORMS[how].changes_values and dtype is None and not blocks:
            made = _unrounded(TRANSFORMS[how], parts, made, sizes, kind)
        for name, tensor in zip(line.sources, made, strict=True):
            if line.shape is not None and tensor.shape != line.shape:
                problems.append(
                    f"shape: {name} would be {list(tensor.shape)}, expected {list(line.shape)}"
                )
            exact = TRANSFORMS[how].changes_values and not blocks
            weights[name] = _settled(tensor, tensor.dtype if exact else kind, dtype, decoded=blocks)
    packed = any(line.rule.transform.startswith(_MXFP4) for line in chosen)
    stored = {i.type.name for i in there.values()} - {
        *PLAIN_FLOATS,
        *(("MXFP4",) if packed else ()),
    }
    return Restored(weights, tuple(problems), packed, tuple(sorted(stored)))


def refuse(problems: Sequence[str], architecture: Architecture, file: GgufFile) -> ConfigError:
    """Return the error for tensors that do not fit."""
    shown = "\n".join(f"  {line}" for line in problems[:_SHOWN])
    rest = len(problems) - _SHOWN
    more = f"\n  ... and {rest} more" if rest > 0 else ""
    return ConfigError(
        f"{file.paths[0]}: {counted(len(problems), 'tensor does', 'tensors do')} "
        f"not fit {architecture.name} as the metadata "
        f"describe it:\n{shown}{more}"
    )


def _choose(
    lines: Sequence[Line], there: Mapping[str, Any], *, packed: bool, file: GgufFile
) -> tuple[list[Line], list[str]]:
    """Return the lines that apply, the first of alternatives, and what is missing."""
    chosen: list[Line] = []
    missing: dict[str, str] = {}
    taken: set[str] = set()
    for line in sorted(lines, key=lambda line: line.order[1]):
        if taken.intersection(line.outputs):
            continue
        if line.rule.transform.startswith(_MXFP4) and not (
            packed
            and all(n in there and file.tensors[n].type.name == "MXFP4" for n in line.outputs)
        ):
            continue
        if all(name in there for name in line.outputs):
            chosen.append(line)
            taken.update(line.outputs)
        elif line.required:
            missing |= {name: f"missing: {name}" for name in line.outputs if name not in there}
    return chosen, [text for name, text in missing.items() if name not in taken]


def _alike(parts: list[LazyTensor]) -> list[LazyTensor]:
    """Bring the parts of one tensor to one dtype, where they are stored in several types."""
    if len({part.dtype for part in parts}) == 1:
        return parts
    return [part.cast(_FLOAT32) for part in parts]


def _unrounded(
    transform: Transform,
    parts: list[LazyTensor],
    made: list[LazyTensor],
    sizes: Mapping[str, int],
    kind: np.dtype,
) -> list[LazyTensor]:
    """Return what a computation is undone to, in 16 bits if that gives the stored values again."""
    narrow = [tensor.cast(kind) for tensor in made]
    again = transform.apply(narrow, sizes)
    same = all(
        np.array_equal(np.asarray(a.read(), np.float32), np.asarray(b.read(), np.float32))
        for a, b in zip(again, parts, strict=True)
    )
    return narrow if same else made


def _settled(
    tensor: LazyTensor, kind: np.dtype, dtype: np.dtype | None, *, decoded: bool
) -> LazyTensor:
    """Give a tensor its dtype: the one asked for, else one that loses nothing that is stored."""
    if not is_float(tensor.dtype):
        return tensor
    if dtype is not None:
        return tensor.cast(dtype)
    if decoded or (tensor.dtype == _FLOAT32 and kind != _FLOAT32 and _fits(tensor, kind)):
        return tensor.cast(kind)
    return tensor


def _fits(tensor: LazyTensor, kind: np.dtype) -> bool:
    """Return whether all values of a float32 tensor are numbers of a 16-bit type."""
    for box, _ in row_slabs(tensor.shape, _SLAB, whole_rows=False):
        if not all(extent(box)):
            continue
        values = tensor.read(tuple(slice(a, b) for a, b in zip(*box, strict=True)))
        with np.errstate(over="ignore"):
            back = values.astype(kind).astype(np.float32)
        if not np.array_equal(back.view(np.uint32), values.view(np.uint32)):
            return False
    return True
