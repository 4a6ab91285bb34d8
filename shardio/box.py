"""Boxes: the index algebra under every layout.

A box is a half-open region ``lo <= index < hi`` of an n-dimensional index space. Flat ranges (how
ZeRO and FSDP cut) become at most ``2n - 1`` boxes; a box of a reshaped space becomes flat runs and
then boxes again. All functions are pure and know nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

Index = tuple[int, ...]
Box = tuple[Index, Index]
Region = Sequence[slice | int] | None


def normalize(region: Region, shape: Index) -> Box:
    """Return the box of a tuple of slices (step 1) or ints; missing dims are full.

    Raises:
        IndexError: more dims than the tensor has, an int out of range, or a step other than 1.
    """
    if region is None:
        return (0,) * len(shape), tuple(shape)
    if len(region) > len(shape):
        raise IndexError(f"region has {len(region)} dims, tensor has shape {tuple(shape)}")
    lo, hi = [], []
    for axis, n in enumerate(shape):
        item = region[axis] if axis < len(region) else slice(None)
        if isinstance(item, slice):
            start, stop, step = item.indices(n)
            if step != 1:
                raise IndexError(f"region step {step} on dim {axis}: only step 1 is supported")
            lo.append(start)
            hi.append(max(start, stop))
        else:
            i = int(item) + (n if item < 0 else 0)
            if not 0 <= i < n:
                raise IndexError(f"index {item} is out of range for dim {axis} of size {n}")
            lo.append(i)
            hi.append(i + 1)
    return tuple(lo), tuple(hi)


def extent(box: Box) -> Index:
    """Return the shape of a box."""
    return tuple(h - l for l, h in zip(*box, strict=True))


def volume(box: Box) -> int:
    """Return the number of elements in a box."""
    return prod(extent(box))


def view(array: np.ndarray, ends: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return ``array[a:b, ...]`` for the (a, b) of each dim: a view even when 0-d."""
    where: tuple[Any, ...] = (*(slice(a, b) for a, b in ends), ...)
    return array[where]


def intersect(a: Box, b: Box) -> Box | None:
    """Return the common box, or None when it is empty."""
    lo = tuple(map(max, a[0], b[0]))
    hi = tuple(map(min, a[1], b[1]))
    if any(l >= h for l, h in zip(lo, hi, strict=True)):
        return None
    return lo, hi


def row_major(shape: Sequence[int], unit: int = 1) -> Index:
    """Return C-order strides of ``shape`` for elements of ``unit`` (bytes or 1)."""
    strides, step = [], unit
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def flat_boxes(start: int, stop: int, shape: Index) -> Iterator[tuple[Box, int]]:
    """Cut the row-major range ``[start, stop)`` of ``shape`` into boxes, in order.

    Yields:
        (box, flat index of the box's first element); at most ``2 * len(shape) - 1`` of them.
    """
    if start >= stop:
        return
    if not shape:
        yield ((), ()), start
        return
    inner = prod(shape[1:])
    if len(shape) == 1 or inner == 1:
        tail = (0,) * (len(shape) - 1)
        yield ((start // inner, *tail), (stop // inner, *shape[1:])), start
        return
    first, head = divmod(start, inner)
    last, end = divmod(stop, inner)
    if head:
        until = min(inner, stop - first * inner)
        yield from _under(first, head, until, shape, inner)
        first += 1
    if first < last:
        tail = (0,) * (len(shape) - 1)
        yield ((first, *tail), (last, *shape[1:])), first * inner
    if end and last >= first:
        yield from _under(last, 0, end, shape, inner)


def _under(row: int, start: int, stop: int, shape: Index, inner: int) -> Iterator[tuple[Box, int]]:
    for (lo, hi), flat in flat_boxes(start, stop, shape[1:]):
        yield ((row, *lo), (row + 1, *hi)), row * inner + flat


def reshape_groups(old: Index, new: Index) -> list[tuple[range, range]]:
    """Pair runs of old dims with runs of new dims of equal product (both spaces non-empty).

    Dims that a reshape leaves alone end up in groups of their own, so that a column shard survives
    a reshape of rows.
    """
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        a = b = 1
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new):
            b, j = new[j], j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        groups.append((range(i0, i), range(j0, j)))
    return groups


def flat_runs(
    lo: Index, hi: Index, shape: Index, strides: Index
) -> Iterator[tuple[int, int, int, int]]:
    """Cut a strided box of ``shape`` into runs that are contiguous in row-major order of ``shape``.

    Args:
        lo, hi: the box.
        shape: the space it lies in.
        strides: memory step of each dim (any unit; used relative to the element at ``lo``).

    Yields:
        (flat start, length, memory offset from the element at ``lo``, memory step between
        elements).
    """
    ext = tuple(h - l for l, h in zip(lo, hi, strict=True))
    flat = row_major(shape)
    axis = len(shape)
    length, step = 1, 0
    while axis > 0:
        k = axis - 1
        if length != prod(shape[axis:]):
            break  # the dims inside are not full: an outer step is not contiguous
        if ext[k] > 1:
            if length > 1 and strides[k] != step * length:
                break
            if length == 1:
                step = strides[k]
            length *= ext[k]
        axis = k
    outer = [range(e) for e in ext[:axis]]
    base = sum(l * f for l, f in zip(lo, flat, strict=True))
    for at in _product(outer):
        shift = sum(i * f for i, f in zip(at, flat, strict=False))
        memory = sum(i * s for i, s in zip(at, strides, strict=False))
        yield base + shift, length, memory, step


def run_count(lo: Index, hi: Index, shape: Index, strides: Index) -> int:
    """Return how many runs ``flat_runs`` would give, without making them."""
    first = next(flat_runs(lo, hi, shape, strides), None)
    if first is None or first[1] == 0:
        return 0
    return volume((lo, hi)) // first[1]


def _product(ranges: Sequence[range]) -> Iterator[Index]:
    if not ranges:
        yield ()
        return
    for i in ranges[0]:
        for rest in _product(ranges[1:]):
            yield (i, *rest)
