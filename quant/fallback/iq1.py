"""IQ1_S and IQ1_M as array programs; see ``search`` for the conventions.

Ternary values with a shift of +-1/8, snapped to a grid of 2048 points. The best three-way split of
the sorted elements of a sub-block is found exhaustively; a sub-block is a column. Source of the
algorithm: ggml's encoders (own implementation); the fast form is ``native/iq1.hpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .neighbours import Grid, grid_like, snap
from .pack import assemble, columns, error_weights, half, larger, lookup, repeated, spread
from .search import (
    Array,
    backend,
    clip,
    divided,
    f32,
    flag,
    nearest,
    over,
    peak,
    real,
    sum_squares,
)

_PLUS = (-0.875, 0.125, 1.125)
_MINUS = (-1.125, -0.125, 0.875)
_LEVELS = np.array([[*_PLUS, _PLUS[0]], [*_MINUS, _MINUS[0]]], np.float32)
_LOWEST = float(np.finfo(np.float32).min)


def _sorted(x: Array, w: Array) -> tuple[Array, Array, Array]:
    """Elements ascending (stable), their weights and their places, all [n, blocks]."""
    if isinstance(x, np.ndarray):
        order = np.argsort(x, axis=0, kind="stable")
        place = order.astype(np.int32)
        return np.take_along_axis(x, order, 0), np.take_along_axis(w, order, 0), place
    order = (x + 0.0).sort(dim=0, stable=True).indices  # adding zero makes both zeros equal
    return x.gather(0, order), w.gather(0, order), order.int()


def _prefix(x: Array) -> list[Array]:
    """Sums of the first 0 .. n rows."""
    sums = [backend(x).zeros_like(x[0])]
    for row in x:
        sums.append(sums[-1] + row)
    return sums


@dataclass(slots=True)
class _Split:
    """Best split so far: sorted elements before ``first`` are -1, before ``second`` 0, then +1."""

    score: Array
    scale: Array
    first: Array
    second: Array
    shift: Array

    @classmethod
    def none(cls, scale: Array) -> _Split:
        """Before any candidate."""
        xp = backend(scale)
        missing = xp.zeros_like(scale, dtype=xp.int32) - 1
        return cls(xp.zeros_like(scale) + _LOWEST, scale, missing, missing, missing)

    def consider(self, qx: Array, q2: Array, first: int, second: int, shift: int) -> None:
        """Take a candidate where it is better."""
        xp = backend(qx)
        better = (q2 > 0) & (qx * qx > self.score * q2)
        scale = qx / q2
        self.scale = xp.where(better, scale, self.scale)
        self.score = xp.where(better, scale * qx, self.score)
        self.first = xp.where(better, self.first * 0 + first, self.first)
        self.second = xp.where(better, self.second * 0 + second, self.second)
        self.shift = xp.where(better, self.shift * 0 + shift, self.shift)


def _products(values: Sequence[float]) -> list[float]:
    return [f32(v * v) for v in values]


def _split_whole(x: Array, w: Array, order: Array, scale: Array) -> _Split:
    """One shift for all 32 elements: 1 is plus, 0 is minus."""
    sx, sw, best = _prefix(w * x), _prefix(w), _Split.none(scale)
    n = x.shape[0]
    for a in range(n + 1):
        for b in range(a, n + 1):
            mid, end, mid_w, end_w = sx[b] - sx[a], sx[n] - sx[b], sw[b] - sw[a], sw[n] - sw[b]
            for shift, v in ((1, _PLUS), (0, _MINUS)):
                qx = sx[a] * v[0] + mid * v[1] + end * v[2]
                q2 = sw[a] * v[0] * v[0] + mid_w * v[1] * v[1] + end_w * v[2] * v[2]
                best.consider(qx, q2, a, b, shift)
    return best


def _half_sums(x: Array, order: Array, side: int) -> list[Array]:
    """Prefix sums over one half's elements only."""
    xp = backend(x)
    mine = order >= 8 if side else order < 8
    sums = [xp.zeros_like(x[0])]
    for row, here in zip(x, mine, strict=True):
        sums.append(xp.where(here, sums[-1] + row, sums[-1]))
    return sums


def _split_halves(x: Array, w: Array, order: Array, scale: Array) -> _Split:
    """A shift per half: bit 1 of ``shift`` is the first half's, bit 0 the second's (1 minus)."""
    sx = [_half_sums(w * x, order, side) for side in (0, 1)]
    sw = [_half_sums(w, order, side) for side in (0, 1)]
    best, n = _Split.none(scale), x.shape[0]
    squares = [(_products(v), v[2]) for v in (_PLUS, _MINUS)]
    for a in range(n + 1):
        for b in range(a, n + 1):
            qx: list[list[Array]] = []
            q2: list[list[Array]] = []
            for h in (0, 1):
                low = sx[h][a] + sx[h][b]
                qx.append([sx[h][n] * top - low for _, top in squares])
                q2.append([
                    sw[h][n] * top * top + sw[h][a] * (s[0] - s[1]) + sw[h][b] * (s[1] - s[2])
                    for s, top in squares
                ])  # fmt: skip
            for shift in range(4):
                i, j = shift >> 1, shift & 1
                best.consider(qx[0][i] + qx[1][j], q2[0][i] + q2[1][j], a, b, shift)
    return best


@dataclass(slots=True)
class _Found:
    """Result over all sub-blocks: scale, packed points, which are not zero, shift bits."""

    scale: Array
    point: Array
    active: Array
    shift: Array
    minus: Array  # [groups, blocks]: whether a group of 8 has the negative shift


def _points(order: Array, best: _Split, negative: Array) -> Array:
    """Packed levels of each group of 8 elements, int32 [groups, blocks]."""
    xp, n = backend(order), order.shape[0]
    groups = []
    for g in range(n // 8):
        point = xp.zeros_like(best.first)
        for e in range(n):
            level = 2 - flag(best.second > e) - flag(best.first > e)
            level = xp.where(negative, 2 - level, level)
            here = order[e] >> 3 == g
            point = xp.where(here, point | level << 2 * (order[e] & 7), point)
        groups.append(point)
    return xp.stack(groups)


def _snapped(x: Array, w: Array, found: _Found, grid: Grid) -> _Found:
    """Move every group to the grid and refit the scale of blocks where one was not on it."""
    xp = backend(x)
    point = found.point
    missed = xp.zeros_like(found.active)
    for g in range(point.shape[0]):
        levels = lookup(_LEVELS, flag(found.minus[g]))
        rows = slice(8 * g, 8 * g + 8)
        new, on_grid = snap(
            grid, levels, x[rows], w[rows], found.scale, point[g : g + 1], found.active
        )
        point[g] = new[0]
        missed = missed | ~on_grid[0]
    qx = q2 = xp.zeros_like(found.scale)
    for e in range(x.shape[0]):
        level = real((point[e // 8] >> 2 * (e % 8) & 3) - 1)
        q = xp.where(found.minus[e // 8], level - 0.125, level + 0.125)
        wq = w[e] * q
        qx, q2 = qx + wq * x[e], q2 + wq * q
    refit = missed & (qx > 0) & (q2 > 0)
    found.scale = xp.where(refit, qx / q2, found.scale)
    return found


def _search(x: Array, w: Array, grid: Grid, halves: bool, epsilon: float) -> _Found:
    xp = backend(x)
    amax, _ = peak(x)
    sorted_x, sorted_w, order = _sorted(x, w)
    best = (_split_halves if halves else _split_whole)(sorted_x, sorted_w, order, amax)
    active = ~(amax < f32(epsilon)) & (best.first >= 0)
    negative = best.scale < 0
    scale = xp.where(negative, -best.scale, best.scale)
    shift = xp.where(negative, (3 if halves else 1) - best.shift, best.shift)
    whole = [shift == 0] * 4
    minus = xp.stack([(shift & 2) != 0, (shift & 1) != 0] if halves else whole)
    point = _points(order, best, negative)
    found = _snapped(x, w, _Found(scale, point, active, shift, minus), grid)
    found.scale = xp.where(active, found.scale, xp.zeros_like(scale))
    return found


def _weights(rows: Array, x: Array, importance: Array | None, pure: bool) -> Array:
    if importance is None:
        return x * x
    n = x.shape[0]
    mean = repeated(divided(2 * sum_squares(columns(rows, 256)), 256), 256 // n)
    return error_weights(x, spread(importance, rows.shape[0], n), mean, pure=pure)


def _by_super_block(q: Array, subs: int) -> Array:
    """[n, blocks * subs] to [subs, n, blocks]."""
    return backend(q).moveaxis(q.reshape(q.shape[0], -1, subs), 2, 0)


def _levels(found: _Found, subs: int) -> tuple[Array, Array, Array]:
    """Three-bit levels [subs, blocks], the unit [blocks] and which blocks are not zero."""
    xp = backend(found.scale)
    scale = found.scale.reshape(-1, subs).T
    top = larger(scale)
    some, d = top != 0, divided(top, 15)
    level = clip(nearest((over(1, d) * scale - 1) * 0.5), 0, 7)
    return xp.where(some, level, xp.zeros_like(level)), d, some


def _codes(found: _Found, grid: Grid) -> Array:
    return grid.code[found.point if isinstance(found.point, np.ndarray) else found.point.long()]


def encode_iq1_s(rows: Array, importance: Array | None, pure: bool = False) -> Array:
    """IQ1_S: sub-blocks of 32 with one shift each."""
    x, xp, grid = columns(rows, 32), backend(rows), grid_like("IQ1_S", rows)
    found = _search(x, _weights(rows, x, importance, pure), grid, False, 1e-12)
    level, d, some = _levels(found, 8)
    d_bytes, _ = half(xp.where(some, d * 1.125, xp.zeros_like(d)))
    code = _codes(found, grid)
    code = xp.where(found.active, code, xp.zeros_like(code))
    below = (found.active & found.minus[0]).reshape(-1, 8).T & some
    code = _by_super_block(code, 8)
    high = (level | 8 * flag(below)) << 12
    for g in range(4):
        high = high | code[:, g] >> 8 << 3 * g
    words = xp.stack([high & 255, high >> 8], 1)
    n = d.shape[0]
    return assemble([d_bytes, code.reshape(32, n), words.reshape(16, n)], rows.shape[0])


def _refit(rows: Array, importance: Array | None, pure: bool, found: _Found, level: Array,
           unfitted: Array) -> Array:  # fmt: skip
    """The block scale over all 256 elements, once the sub-block scales are rounded."""
    x = columns(rows, 256)
    xp = backend(x)
    w = _weights(rows, x, importance, pure)
    point, minus = _by_super_block(found.point, 16), _by_super_block(found.minus, 16)
    qx = q2 = xp.zeros_like(unfitted)
    for e in range(256):
        b, g = e // 16, e // 8 % 2
        unit = real((point[b, g] >> 2 * (e % 8) & 3) - 1)
        q = xp.where(minus[b, g], unit - 0.125, unit + 0.125) * real(2 * level[b] + 1)
        wq = w[e] * q
        qx, q2 = qx + wq * x[e], q2 + wq * q
    return xp.where(q2 > 0, qx / q2, unfitted)


def encode_iq1_m(rows: Array, importance: Array | None, pure: bool = False) -> Array:
    """IQ1_M: sub-blocks of 16 with a shift per half; the float16 scale lies in four nibbles."""
    x, xp, grid = columns(rows, 16), backend(rows), grid_like("IQ1_M", rows)
    found = _search(x, _weights(rows, x, importance, pure), grid, True, 1e-7)
    first = int((grid.code == 0).nonzero()[0][0])
    found.point = xp.where(found.active, found.point, found.point * 0 + first)
    found.minus = found.minus & found.active
    level, d, some = _levels(found, 16)
    d = _refit(rows, importance, pure, found, level, d)
    (low, top), _ = half(d * f32(1.1125))
    bits = low | top << 8
    n = d.shape[0]
    scales = level.reshape(4, 4, n)
    words = [
        scales[k, 0] | scales[k, 1] << 3 | scales[k, 2] << 6 | scales[k, 3] << 9
        | (bits >> 4 * k & 15) << 12 for k in range(4)
    ]  # fmt: skip
    code = _by_super_block(_codes(found, grid), 16)
    minus = flag(_by_super_block(found.minus, 16))
    high = code[:, 0] >> 8 | 8 * minus[:, 0] | (code[:, 1] >> 8 | 8 * minus[:, 1]) << 4
    tail = xp.stack([byte for word in words for byte in (word & 255, word >> 8)])
    data = xp.concatenate([code.reshape(32, n) & 255, high, tail])
    return assemble([xp.where(some, data, xp.zeros_like(data))], rows.shape[0])


ENCODERS = {"IQ1_S": encode_iq1_s, "IQ1_M": encode_iq1_m}
FULL = {name: partial(encoder, pure=True) for name, encoder in ENCODERS.items()}
