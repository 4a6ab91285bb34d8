"""The two public calls: ``quantize`` and ``dequantize``.

Both check their input, then hand whole rows to the native kernels, to a GPU on request, or to the
numpy fallback when the package was installed without a compiler. The bytes are the same every
way, and never depend on the number of threads. Float types (F32, F16, BF16) are plain casts: NaN
and infinity pass through; block types refuse them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from threading import Lock
from types import ModuleType

import numpy as np
import numpy.typing as npt

from ..errors import QuantError
from .device import dequantize_on, has_array_program, quantize_on
from .fallback import decode, encode, scales_overflow
from .floats import BFLOAT16, FLOAT16, FLOAT32, bf16_bits, f16_bits, to_float32
from .grids import GRID_TYPES, load_grid
from .measure import ErrorSums, choose_blocks
from .types import GgmlType, type_by_name

_GRID_LOCK = Lock()
_CHUNK = 1 << 19
_INPUTS = {FLOAT32: 0, FLOAT16: 1, BFLOAT16: 2}


@cache
def _native() -> ModuleType | None:
    try:
        return import_module("._native", __package__)
    except ImportError:
        return None


def have_native() -> bool:
    """Return whether the compiled kernels are installed."""
    return _native() is not None


def quantize(
    x: npt.NDArray,
    type: str | GgmlType,
    importance: npt.NDArray[np.float32] | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    best: bool = False,
    errors: ErrorSums | None = None,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Encode the rows of ``x`` as a ggml type; the bytes equal ``ggml_quantize_chunk``'s.

    That includes ggml's one encoding fault: in an IQ3_S block where a run of 32 elements is all
    zero and a later one is not, codes move up and decode wrongly; ``best`` encodes these right.

    Args:
        x: [..., rows, cols], float32, float16 or bfloat16 (ml_dtypes), C-contiguous.
        type: a ggml type or its name.
        importance: float32 [cols], the mean squared activation per column (an importance matrix
            entry), shared by all rows; types that cannot use it ignore it.
        threads: worker threads (default: all processors).
        device: ``"cpu"``, or a torch device such as ``"cuda"``. The bytes are the same.
        best: search for less error than ggml leaves, in the same format and size: per block the
            better of ggml's encoding and of a search that minimizes the squared error (times
            importance). Never worse than the default; not ggml's bytes. Types that need importance
            still do: equal weights would hide that the model is lost.
        errors: gets the squared errors of block types added.
        out: where to write, uint8 [..., rows, row bytes], C-contiguous; allocated if absent.

    Returns:
        uint8 [..., rows, row bytes].

    Raises:
        QuantError: unknown type, wrong dtype or shape, NaN or infinity, a value or scale beyond
            float16, or a missing importance vector.
        ConfigError: the device cannot be used.
    """
    kind = type_by_name(type)
    _check_input(x, kind)
    cols = x.shape[-1]
    shape = (*x.shape[:-1], kind.row_bytes(cols))
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise QuantError(f"out must be C-contiguous uint8 of shape {shape}, not {out.shape}")
    weights = _check_importance(importance, kind, cols)
    if x.size:
        source, target = x.reshape(-1, cols), out.reshape(-1, shape[-1])
        native = _native()
        task = _Task(kind, weights, best and kind.is_quantized, errors)
        if device != "cpu" and has_array_program(kind):
            _quantize_torch(device, source, task, target)
        elif native is not None and native.can_quantize(kind.id):
            _quantize_native(native, source, task, target, threads)
        else:
            _quantize_numpy(source, task, target)
    return out


def dequantize(
    data: npt.NDArray[np.uint8],
    type: str | GgmlType,
    shape: tuple[int, ...],
    *,
    dtype: npt.DTypeLike = np.float32,
    threads: int | None = None,
    device: str = "cpu",
) -> npt.NDArray:
    """Decode ggml bytes to an array.

    Args:
        data: uint8 of any shape, holding exactly ``prod(shape)`` elements of the type.
        type: a ggml type or its name.
        shape: the shape to return; its last axis is a multiple of the block size.
        dtype: float32, float16 or bfloat16 (rounded from float32 to nearest even).
        threads: worker threads (default: all processors).
        device: ``"cpu"``, or a torch device; types without a kernel there are decoded on the CPU.

    Returns:
        An array of ``shape`` and ``dtype``; the same values on every device.

    Raises:
        QuantError: unknown type, or ``data`` does not have the size that ``shape`` needs.
        ConfigError: the device cannot be used.
    """
    kind = type_by_name(type)
    cols = shape[-1] if shape else 1
    wanted = prod(shape[:-1]) * kind.row_bytes(cols)
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if flat.size != wanted:
        raise QuantError(
            f"{kind.name} data of shape {tuple(shape)} takes {wanted} bytes, got {flat.size}"
        )
    target = np.dtype(dtype)
    if target not in _INPUTS:
        raise QuantError(f"cannot decode to {target}: choose float32, float16 or bfloat16")
    values = _decode(flat, kind, threads, device) if flat.size else np.empty(0, np.float32)
    return _narrow(values, target).reshape(shape)


def _decode(
    flat: npt.NDArray[np.uint8], kind: GgmlType, threads: int | None, device: str
) -> npt.NDArray[np.float32]:
    if device != "cpu":
        found = dequantize_on(device, flat, kind)
        if found is not None:
            return found
    native = _native()
    if native is None or not native.can_dequantize(kind.id):
        return decode(flat, kind)
    _install_grid(native, kind)
    values = np.empty(flat.size // kind.bytes * kind.block, np.float32)
    native.dequantize(kind.id, flat, values, threads or os.cpu_count() or 1)
    return values


def _install_grid(native: ModuleType, kind: GgmlType) -> None:
    if kind.name in GRID_TYPES:
        with _GRID_LOCK:
            if not native.has_grid(kind.id):
                native.set_grid(kind.id, *load_grid(kind.name))


def _narrow(values: npt.NDArray[np.float32], target: np.dtype) -> npt.NDArray:
    if target == BFLOAT16:
        return bf16_bits(values).view(BFLOAT16)
    return f16_bits(values).view(FLOAT16) if target == FLOAT16 else values


def _check_input(x: npt.NDArray, kind: GgmlType) -> None:
    if x.dtype not in _INPUTS:
        raise QuantError(
            f"cannot quantize {x.dtype} data: convert it to float32, float16 or bfloat16 first"
        )
    if x.ndim == 0 or not x.flags.c_contiguous:
        raise QuantError(
            f"expected a C-contiguous array of rows, got shape {x.shape} with strides {x.strides}"
        )
    if kind.kind == "int" or kind.name == "F64" or not kind.storable:
        raise QuantError(f"{kind.name} is not a type that weights are quantized to")


def _check_importance(
    importance: npt.NDArray[np.float32] | None, kind: GgmlType, cols: int
) -> npt.NDArray[np.float32] | None:
    if importance is None:
        if kind.needs_importance:
            raise QuantError(
                f"{kind.name} needs an importance matrix, with best as well: so few bits work only "
                "where they go to the columns that matter. Pass one, or choose a type that works "
                "without (IQ3_S, Q2_K, Q3_K, ...)"
            )
        return None
    weights = np.ascontiguousarray(importance, np.float32)
    if weights.shape != (cols,):
        raise QuantError(
            f"the importance vector has shape {weights.shape}, but rows have {cols} columns"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise QuantError("the importance vector holds negative, infinite or NaN values")
    return weights


@dataclass(frozen=True, slots=True)
class _Task:
    """What to do with rows, once checked."""

    kind: GgmlType
    weights: npt.NDArray[np.float32] | None
    best: bool
    errors: ErrorSums | None

    @property
    def compares(self) -> bool:
        """Whether encoded rows are decoded again."""
        return self.kind.is_quantized and (self.best or self.errors is not None)

    def choose(
        self,
        rows: npt.NDArray[np.float32],
        out: npt.NDArray[np.uint8],
        other: npt.NDArray[np.uint8] | None,
    ) -> None:
        """Take over the better blocks of ``other`` and add up the errors."""
        decoded = [dequantize(e, self.kind, rows.shape) for e in (out, other) if e is not None]
        sums = choose_blocks(rows, self.weights, self.kind, out, decoded, other)
        if self.errors is not None:
            self.errors.add(sums)


def _quantize_native(
    native: ModuleType,
    x: npt.NDArray,
    task: _Task,
    out: npt.NDArray[np.uint8],
    threads: int | None,
) -> None:
    kind = task.kind
    _install_grid(native, kind)
    raw = x.view(np.uint16) if x.dtype != FLOAT32 else x.view(np.uint32)
    sums = np.zeros(3) if task.errors is not None and task.compares else None
    status = native.quantize(
        kind.id, raw.view(np.uint8), _INPUTS[x.dtype], x.shape[1], task.weights, out,
        threads or os.cpu_count() or 1, best=task.best, sums=sums,
    )  # fmt: skip
    if status & 1:
        raise _not_finite(x, kind)
    if status & 2:
        raise _overflow(x, kind)
    if sums is not None and task.errors is not None:
        task.errors.add(sums)


def _quantize_torch(device: str, x: npt.NDArray, task: _Task, out: npt.NDArray[np.uint8]) -> None:
    kind = task.kind
    if not quantize_on(device, x, kind, task.weights, out):
        raise _not_finite(x, kind)
    if scales_overflow(out, kind):
        raise _overflow(x, kind)
    if not task.compares:
        return
    other = np.empty_like(out) if task.best else None
    if other is not None:
        quantize_on(device, x, kind, task.weights, other, full=True)
    step = max(1, _CHUNK // x.shape[1])
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        task.choose(to_float32(x[part]), out[part], None if other is None else other[part])


def _quantize_numpy(x: npt.NDArray, task: _Task, out: npt.NDArray[np.uint8]) -> None:
    kind, step = task.kind, max(1, _CHUNK // x.shape[1])
    for start in range(0, x.shape[0], step):
        part = x[start : start + step]
        target = out[start : start + step]
        if kind.kind == "float":
            target[...] = _cast(part, kind).view(np.uint8).reshape(target.shape)
            continue
        rows = to_float32(part)
        if not np.isfinite(rows).all():
            raise _not_finite(x, kind)
        target[...] = encode(rows, kind, task.weights)
        if scales_overflow(target, kind):
            raise _overflow(x, kind)
        if task.compares:
            other = encode(rows, kind, task.weights, full=True) if task.best else None
            task.choose(rows, target, other)


def _cast(x: npt.NDArray, kind: GgmlType) -> npt.NDArray:
    if kind.name == "BF16":
        return x.view(np.uint16) if x.dtype == BFLOAT16 else bf16_bits(to_float32(x))
    if kind.name == "F32":
        return to_float32(x)
    if x.dtype == FLOAT16:
        return x.view(np.uint16)
    rows = to_float32(x)
    half = f16_bits(rows)
    if (((half & np.uint16(0x7FFF)) == 0x7C00) & np.isfinite(rows)).any():
        raise _overflow(x, kind)
    return half


def _not_finite(x: npt.NDArray, kind: GgmlType) -> QuantError:
    bad = ~np.isfinite(to_float32(x))
    row, col = np.unravel_index(int(bad.argmax()), x.shape)
    return QuantError(
        f"{int(bad.sum())} of {x.size} values are NaN or infinite (first: row {row}, column "
        f"{col}), and {kind.name} cannot hold them: fix the checkpoint or keep this tensor in F32"
    )


def _overflow(x: npt.NDArray, kind: GgmlType) -> QuantError:
    what = "values" if kind.name == "F16" else "block scales"
    largest = float(np.abs(to_float32(x)).max())
    return QuantError(
        f"{what} do not fit in float16 for {kind.name} (largest value {largest:.6g}): "
        "use BF16 or F32 for this tensor"
    )
