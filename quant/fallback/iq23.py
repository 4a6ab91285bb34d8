"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S as array programs; see ``search`` for the conventions.

Magnitudes are snapped to a grid of points, signs are kept apart, scales are odd multiples of a
unit. A sub-block is a column, so all candidates of a scale run over all sub-blocks at once. Source
of the algorithm: ggml's encoders (own implementation); the fast form is ``native/iq23.hpp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .neighbours import Grid, grid_like, odd_levels, snap
from .pack import assemble, columns, error_weights, half, larger, repeated, spread
from .search import (
    Array,
    backend,
    clip,
    divided,
    f32,
    flag,
    nearest,
    over,
    real,
    root,
    search_positive,
    sum_squares,
)


@dataclass(frozen=True, slots=True)
class Format:
    """What differs between the formats.

    Attributes:
        name: of the type.
        block: elements of a sub-block.
        levels: magnitudes per coordinate.
        tries, step: how far scales are tried either way, and how fine.
        epsilon: peaks below count as zero.
        mean: factor of the mean square in the error weights.
        fudge: factor of the stored scale.
        parity: only 7 of 8 signs are stored, their parity is even.
        search_first: start from a search without grid.
        refit_all: the refit rounds every group again, not only those that missed the grid.
    """

    name: str
    block: int
    levels: int
    tries: int
    step: float
    epsilon: float
    mean: float
    fudge: float
    parity: bool = False
    search_first: bool = False
    refit_all: bool = False


_FORMATS = (
    Format("IQ2_XXS", 32, 3, 6, 0.1, 1e-15, 1, 1, True, True, True),
    Format("IQ2_XS", 16, 3, 9, 0.1, 1e-15, 1, 1, True),
    Format("IQ2_S", 16, 3, 9, 0.1, 1e-8, 2, 0.9875),
    Format("IQ3_XXS", 32, 8, 15, 0.2, 1e-8, 2, 1.0125, True),
    Format("IQ3_S", 32, 8, 9, 0.2, 0, 2, 1.033, refit_all=True),
)


def _strip_signs(x: Array, w: Array, parity: bool) -> tuple[Array, Array]:
    """Magnitudes [n, blocks] and sign bits [n/8, blocks].

    With ``parity`` the cheapest element of a group with an odd count of minus signs is flipped.
    """
    xp, shape = backend(x), x.shape
    minus = ~(x >= 0)
    m = xp.where(minus, -x, x)
    if parity:
        groups = (shape[0] // 8, 8, shape[1])
        cost = (w * x * x).reshape(groups)
        low, cheapest = cost[:, 0], xp.zeros_like(cost[:, 0], dtype=xp.int32)
        odd = minus.reshape(groups)[:, 0]
        for i in range(1, 8):
            lower = cost[:, i] < low
            low = xp.where(lower, cost[:, i], low)
            cheapest = xp.where(lower, xp.zeros_like(cheapest) + i, cheapest)
            odd = odd ^ minus.reshape(groups)[:, i]
        flip = xp.stack([odd & (cheapest == i) for i in range(8)], 1).reshape(shape)
        m = xp.where(flip, -m, m)
        minus = minus ^ flip
    bits = flag(minus).reshape(-1, 8, shape[1])
    sign = bits[:, 0]
    for i in range(1, 7 if parity else 8):
        sign = sign | bits[:, i] << i
    return m, sign


def _round(m: Array, inverse: Array, f: Format, grid: Grid) -> Array:
    """Packed levels [groups, blocks]."""
    level = clip(nearest((inverse * m - 1) * 0.5), 0, f.levels - 1)
    parts = level.reshape(-1, grid.dims, m.shape[1])
    packed = parts[:, 0]
    for i in range(1, grid.dims):
        packed = packed | parts[:, i] << grid.bits * i
    return packed


def _fit(w: Array, wx: Array, point: Array, grid: Grid) -> tuple[Array, Array]:
    mask, dims = (1 << grid.bits) - 1, grid.dims
    qx = q2 = None
    for e in range(w.shape[0]):
        level = point[e // dims] >> grid.bits * (e % dims) & mask
        q = real(2 * level + 1)
        a, b = wx[e] * q, w[e] * q * q
        qx, q2 = (a, b) if qx is None else (qx + a, q2 + b)
    return qx, q2


@dataclass(slots=True)
class _Found:
    """Result over all sub-blocks: packed points, sign bits, scales, which are not zero."""

    point: Array
    sign: Array
    scale: Array
    active: Array


def _search(x: Array, w: Array, f: Format, grid: Grid) -> _Found:
    xp, top = backend(x), 2 * f.levels - 1
    m, sign = _strip_signs(x, w, f.parity)
    deviation, wx, levels = root(w), w * m, odd_levels(x, 1 << grid.bits)
    peak = m[0]
    for row in m[1:]:
        peak = xp.where(peak > row, peak, row)
    active = ~(peak < f32(f.epsilon)) if f.epsilon else peak != 0
    denominator, scale = peak, divided(peak, top)
    if f.search_first:
        scale, _ = search_positive(m, w, f.levels + 1)
        denominator = scale * f.levels
        active = active & (denominator > 0)
    best = xp.zeros_like(scale)
    point = xp.zeros_like(x[: f.block // grid.dims], dtype=xp.int32)
    good = (point == 0) & (not f.refit_all)
    for k in range(-f.tries, f.tries + 1):
        inverse = over(f32(top + f32(k * f32(f.step))), denominator)
        trial = _round(m, inverse, f, grid)
        trial, on_grid = snap(grid, levels, m, deviation, over(1, inverse), trial, active)
        qx, q2 = _fit(w, wx, trial, grid)
        better = (q2 > 0) & (qx * qx > best * q2) & active
        fitted = qx / q2
        scale = xp.where(better, fitted, scale)
        best = xp.where(better, fitted * qx, best)
        point, good = xp.where(better, trial, point), xp.where(better, on_grid, good)
    # Refit: groups that missed the grid (or all) are rounded again with the final scale.
    again = (scale > 0) & active
    if not f.search_first:
        again = again & ~good.all(0)
    redo = again if f.refit_all else again & ~good
    trial = xp.where(redo, _round(m, over(1, scale), f, grid), point)
    trial, _ = snap(grid, levels, m, deviation, scale, trial, again)
    point = xp.where(redo, trial, point)
    qx, q2 = _fit(w, wx, point, grid)
    scale = xp.where(again & (q2 > 0), qx / q2, scale)
    negative = scale < 0
    sign = xp.where(negative, sign ^ (127 if f.parity else 255), sign)
    scale = xp.where(negative, -scale, scale)
    zero = xp.zeros_like(scale)
    return _Found(
        point, xp.where(active, sign, xp.zeros_like(sign)), xp.where(active, scale, zero), active
    )


def encode(rows: Array, importance: Array | None, f: Format, pure: bool = False) -> Array:
    """Encode rows; ``pure`` takes ``importance`` as the error weights and mends ggml's IQ3_S."""
    x, xp, grid = columns(rows, f.block), backend(rows), grid_like(f.name, rows)
    subs = 256 // f.block
    mean = repeated(f.mean * sum_squares(columns(rows, 256)) / 256, subs)
    if importance is not None:
        w = error_weights(x, spread(importance, rows.shape[0], f.block), mean, pure=pure)
    else:
        w = mean * 0.25 + x * x if f.name == "IQ2_S" else x * x
    found = _search(x, w, f, grid)
    scale = found.scale.reshape(-1, subs).T  # [sub-blocks, blocks]
    top = larger(scale)
    some = top != 0
    d = divided(top, 31)
    level = clip(nearest((over(1, d) * scale - 1) * 0.5), 0, 15)
    level = xp.where(some, level, xp.zeros_like(level))
    d_bytes, _ = half(xp.where(some, d * f32(f.fudge), xp.zeros_like(d)))
    code = grid.code[found.point if xp.__name__ == "numpy" else found.point.long()]
    code = xp.where(found.active, code, xp.zeros_like(code))
    parts = _PACK[f.name](
        _by_super_block(code, subs), _by_super_block(found.sign, subs), level,
        None if pure else found.active.reshape(-1, subs).T,
    )  # fmt: skip
    return assemble([d_bytes, *parts], rows.shape[0])


def _by_super_block(q: Array, subs: int) -> Array:
    """[n, blocks * subs] to [subs, n, blocks]."""
    return backend(q).moveaxis(q.reshape(q.shape[0], -1, subs), 2, 0)


def _bytes_of(word: Array, count: int) -> Array:
    """Little-endian bytes of words [n, ..., blocks]: [n, ..., count, blocks]."""
    return backend(word).stack([word >> 8 * k & 255 for k in range(count)], -2)


def _sign_word(sign: Array, level: Array) -> Array:
    """Four bytes: 4 x 7 sign bits and a 4-bit scale; sign [subs, 4, blocks]."""
    word = sign[:, 0] | sign[:, 1] << 7 | sign[:, 2] << 14 | sign[:, 3] << 21 | level << 28
    return _bytes_of(word, 4)


def _merged(q: Array, bits: int, per_byte: int) -> Array:
    """Pack small codes [n, blocks], ``per_byte`` to a byte, the first lowest."""
    parts = q.reshape(-1, per_byte, q.shape[-1])
    packed = parts[:, 0]
    for k in range(1, per_byte):
        packed = packed | parts[:, k] << bits * k
    return packed


def _flat(q: Array) -> Array:
    return q.reshape(-1, q.shape[-1])


def _pack_iq2_xxs(code: Array, sign: Array, level: Array, active: Array | None) -> list[Array]:
    return [_flat(backend(code).concatenate([code, _sign_word(sign, level)], 1))]


def _pack_iq2_xs(code: Array, sign: Array, level: Array, active: Array | None) -> list[Array]:
    return [_flat(_bytes_of(code | sign << 9, 2)), _merged(level, 4, 2)]


def _pack_iq2_s(code: Array, sign: Array, level: Array, active: Array | None) -> list[Array]:
    code = _flat(code)
    return [code, _flat(sign), _merged(code >> 8, 2, 4), _merged(level, 4, 2)]


def _pack_iq3_xxs(code: Array, sign: Array, level: Array, active: Array | None) -> list[Array]:
    return [_flat(code), _flat(_sign_word(sign, level))]


def _pack_iq3_s(code: Array, sign: Array, level: Array, active: Array | None) -> list[Array]:
    xp, high = backend(code), _merged(_flat(code) >> 8, 1, 8)
    if active is not None:
        # ggml does not step over an all-zero sub-block: what follows moves up, to no good.
        place = xp.cumsum(flag(active), 0) - 1
        moved = [xp.zeros_like(code), xp.zeros_like(sign)]
        for to in range(8):
            for source in range(to, 8):
                here = active[source] & (place[source] == to)
                for target, q in zip(moved, (code, sign), strict=True):
                    target[to] = xp.where(here, q[source], target[to])
        code, sign = moved
    return [_flat(code), high, _flat(sign), _merged(level, 4, 2)]


_PACK = {
    "IQ2_XXS": _pack_iq2_xxs,
    "IQ2_XS": _pack_iq2_xs,
    "IQ2_S": _pack_iq2_s,
    "IQ3_XXS": _pack_iq3_xxs,
    "IQ3_S": _pack_iq3_s,
}

ENCODERS = {f.name: partial(encode, f=f) for f in _FORMATS}
FULL = {f.name: partial(encode, f=f, pure=True) for f in _FORMATS}
