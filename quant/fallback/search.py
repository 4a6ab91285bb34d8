"""The scale searches as array programs over a blocks axis, for numpy arrays and torch tensors.

Arrays are [elements, blocks]: every block is a column, sums run over elements strictly in order,
branches are selects. Each step is one float32 operation, so results are bit-identical to the
native kernels and to ggml on any backend that rounds division and square root correctly.
``native/search.hpp`` has the same algorithms with comments on their source.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor

EPSILON = 1e-15
_MAGIC = 12582912.0


def backend(x: Array) -> ModuleType:
    """Return numpy or torch, whichever ``x`` belongs to."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def f32(value: float) -> float:
    """Round a Python number to float32: what C computes for a float constant expression."""
    return float(np.float32(value))


def real(x: Array) -> Array:
    """Convert integers to float32."""
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()


def flag(mask: Array) -> Array:
    """Convert booleans to int32."""
    return mask.astype(np.int32) if isinstance(mask, np.ndarray) else mask.int()


def nearest(x: Array) -> Array:
    """Round half to even, as int32; beyond 2**22 it wraps as in the reference, NaN gives 0."""
    xp = backend(x)
    if xp is not np:
        x = x.nan_to_num(0.0, float("inf"), float("-inf"))  # NaN has other bits on a GPU
    return ((x + _const(x, _MAGIC)).view(xp.int32) & 0x007FFFFF) - 0x00400000


def total(x: Array) -> Array:
    """Sum [elements, ...] over elements in order."""
    result = x[0]
    for i in range(1, x.shape[0]):
        result = result + x[i]
    return result


def sum_squares(x: Array) -> Array:
    """Sum of squares over elements in order."""
    return total(x * x)


def over(value: float, x: Array) -> Array:
    """value / x, rounded once (torch would multiply by a rounded reciprocal)."""
    if isinstance(x, np.ndarray):
        return np.float32(value) / x
    return backend(x).full_like(x, value) / x


def divided(x: Array, value: float) -> Array:
    """x / value, rounded once (on a GPU torch would multiply by a rounded reciprocal)."""
    if isinstance(x, np.ndarray):
        return x / np.float32(value)
    return x / backend(x).full_like(x, value)


def root(x: Array) -> Array:
    """Square root, rounded once (torch on a CPU may use a less exact library in float32)."""
    return np.sqrt(x) if isinstance(x, np.ndarray) else x.double().sqrt().float()


def clip(x: Array, low: int, high: int) -> Array:
    """Clamp integers."""
    return backend(x).clip(x, low, high)


def _const(x: Array, value: float) -> Any:
    return np.float32(value) if isinstance(x, np.ndarray) else value


def _zero(x: Array) -> Array:
    return backend(x).zeros_like(x)


def peak(x: Array) -> tuple[Array, Array]:
    """Return the largest magnitude per block and the first signed value that has it."""
    xp = backend(x)
    amax, value = _zero(x[0]), _zero(x[0])
    for i in range(x.shape[0]):
        a = xp.abs(x[i])
        more = a > amax
        amax = xp.where(more, a, amax)
        value = xp.where(more, x[i], value)
    return amax, value


@dataclass(slots=True)
class Symmetric:
    """A symmetric search's result; ``levels`` reproduces the stored integers."""

    scale: Array
    inverse: Array
    zero: Array
    top: int

    def levels(self, x: Array) -> Array:
        """Return the stored levels (0 .. 2*top-1) of ``x``."""
        q = clip(nearest(self.inverse * x), -self.top, self.top - 1) + self.top
        return backend(x).where(self.zero, _zero(q), q)


def search_symmetric(x: Array, w: Array, top: int) -> Symmetric:
    """Best signed scale for levels -top .. top-1 with error weights ``w``."""
    xp = backend(x)
    amax, value = peak(x)
    zero = amax < _const(x, EPSILON)
    value = xp.where(zero, xp.ones_like(value), value)
    wx = w * x
    scale = best = inverse = _zero(amax)
    for k in (None, *(k for k in range(-9, 10) if k)):
        reach = float(top) if k is None else f32(top + f32(f32(0.1) * k))
        trial = over(-reach, value)
        level = real(clip(nearest(trial * x), -top, top - 1))
        lx, l2 = total(wx * level), total(w * level * level)
        if k is None:
            scale = xp.where(l2 != 0, lx / l2, _zero(lx))
            best, inverse = scale * lx, trial
            continue
        better = (l2 > 0) & (lx * lx > best * l2)
        fitted = lx / l2
        scale = xp.where(better, fitted, scale)
        best = xp.where(better, fitted * lx, best)
        inverse = xp.where(better, trial, inverse)
    return Symmetric(xp.where(zero, _zero(scale), scale), inverse, zero, top)


@dataclass(slots=True)
class Asymmetric:
    """x = scale * level - minimum; ``levels`` reproduces the winning integers."""

    scale: Array
    minimum: Array
    inverse: Array
    base: Array
    flat: Array
    top: int

    def levels(self, x: Array) -> Array:
        """Return the winning levels (0 .. top) of ``x``."""
        q = clip(nearest(self.inverse * (x - self.base)), 0, self.top)
        return backend(x).where(self.flat, _zero(q), q)


@dataclass(frozen=True, slots=True)
class Steps:
    """The inverse scales an asymmetric search tries, and whether errors are absolute."""

    start: float
    delta: float
    count: int
    absolute: bool = False


WITH_IMPORTANCE = Steps(-0.9, 0.05, 36)


def _error(x: Array, w: Array, level: Array, scale: Array, base: Array, absolute: bool) -> Array:
    diff = scale * level + base - x
    return total(w * (backend(x).abs(diff) if absolute else diff * diff))


def search_asymmetric(x: Array, w: Array, top: int, steps: Steps) -> Asymmetric:
    """Best scale and minimum (never above zero) for levels 0 .. top with error weights ``w``."""
    xp = backend(x)
    low, high = x[0], x[0]
    for i in range(1, x.shape[0]):
        low = xp.where(x[i] < low, x[i], low)
        high = xp.where(x[i] > high, x[i], high)
    base = xp.where(low > 0, _zero(low), low)
    sum_w, sum_x = total(w), total(w * x)
    flat = high <= base
    inverse = over(top, high - base)
    found_inverse, found_base = inverse, base
    scale = over(1, inverse)
    level = real(clip(nearest(inverse * (x - base)), 0, top))
    best = _error(x, w, level, scale, base, steps.absolute)
    for k in range(steps.count + 1):
        reach = f32(f32(f32(steps.start) + f32(f32(steps.delta) * k)) + top)
        inverse = over(reach, high - base)
        level = real(clip(nearest(inverse * (x - base)), 0, top))
        wl = w * level
        l, l2, xl = total(wl), total(wl * level), total(wl * x)
        det = sum_w * l2 - l * l
        this_scale = (sum_w * xl - sum_x * l) / det
        this_base = (l2 * sum_x - l * xl) / det
        above = this_base > 0
        this_base = xp.where(above, _zero(this_base), this_base)
        this_scale = xp.where(above, xl / l2, this_scale)
        error = _error(x, w, level, this_scale, this_base, steps.absolute)
        better = (det > 0) & (error < best) & ~flat
        best = xp.where(better, error, best)
        scale = xp.where(better, this_scale, scale)
        found_inverse = xp.where(better, inverse, found_inverse)
        found_base = xp.where(better, base, found_base)
        base = xp.where(better, this_base, base)
    scale = xp.where(flat, _zero(scale), scale)
    return Asymmetric(scale, -base, found_inverse, found_base, flat, top)


def search_positive(x: Array, w: Array, top: int) -> tuple[Array, Array]:
    """Quantize positive values (a super-block's scales); returns the scale and byte levels."""
    xp = backend(x)
    most = _zero(x[0])
    for i in range(x.shape[0]):
        most = xp.maximum(most, x[i])
    zero = most < _const(x, EPSILON)
    safe = xp.where(zero, xp.ones_like(most), most)
    inverse = over(top, safe)
    diff = x - over(1, inverse) * real(nearest(inverse * x) & 255)
    best = total(w * diff * diff)
    for k in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = over(f32(f32(f32(0.1) * k) + top), safe)
        diff = x - over(1, trial) * real(clip(nearest(trial * x), -(1 << 30), top))
        error = total(w * diff * diff)
        better = error < best
        best = xp.where(better, error, best)
        inverse = xp.where(better, trial, inverse)
    signed = clip(nearest(inverse * x), -(1 << 30), top)
    f = real(signed)
    lx, l2 = total(w * x * f), total(w * f * f)
    level = [signed[i] & 255 for i in range(x.shape[0])]
    for _ in range(5):
        changed = False
        for i, row in enumerate(level):
            f, wx = real(row), w[i] * x[i]
            slx, sl2 = lx - wx * f, l2 - w[i] * f * f
            new = clip(nearest(x[i] * sl2 / slx), -(1 << 30), top)
            maybe = (slx > 0) & (sl2 > 0) & (new != row)
            g = real(new)
            slx, sl2 = slx + wx * g, sl2 + w[i] * g * g
            maybe = maybe & (slx * slx * l2 > lx * lx * sl2)
            level[i] = xp.where(maybe, new & 255, row)
            lx, l2 = xp.where(maybe, slx, lx), xp.where(maybe, sl2, l2)
            changed = changed or bool(maybe.any())
        if not changed:
            break
    q = xp.stack([xp.where(zero, _zero(row), row) for row in level])
    return xp.where(zero | ~(l2 > 0), _zero(lx), lx / l2), q


def descend_symmetric(x: Array, top: int) -> tuple[Array, Array]:
    """Coordinate descent with weights x*x; returns the scale and stored levels (0 .. 2*top-1)."""
    xp = backend(x)
    amax, value = peak(x)
    zero = amax < _const(x, EPSILON)
    inverse = over(-top, xp.where(zero, xp.ones_like(value), value))
    signed = clip(nearest(inverse * x), -top, top - 1)
    w = x * x
    wx, f = w * x, real(signed)
    lx, l2 = total(wx * f), total(w * f * f)
    level = [signed[i] for i in range(x.shape[0])]
    for _ in range(5):
        changed = False
        for i, row in enumerate(level):
            f = real(row)
            slx, sl2 = lx - wx[i] * f, l2 - w[i] * f * f
            new = clip(nearest(x[i] * sl2 / slx), -top, top - 1)
            maybe = (slx > 0) & (new != row) & ~zero
            g = real(new)
            slx, sl2 = slx + wx[i] * g, sl2 + w[i] * g * g
            maybe = maybe & (sl2 > 0) & (slx * slx * l2 > lx * lx * sl2)
            level[i] = xp.where(maybe, new, row)
            lx, l2 = xp.where(maybe, slx, lx), xp.where(maybe, sl2, l2)
            changed = changed or bool(maybe.any())
        if not changed:
            break
    q = xp.stack([xp.where(zero, _zero(row), row + top) for row in level])
    return xp.where(zero | ~(l2 > 0), _zero(lx), lx / l2), q
