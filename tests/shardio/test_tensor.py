"""The lazy tensor algebra against numpy: any tiling, any movement, any region."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.shardio.chunked import Chunked
from mconv.shardio.source import FileSource, MemorySource
from mconv.shardio.tensor import LazyTensor, concat, from_array, stack


def make(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    return np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[slice, ...]:
    out = []
    for n in shape:
        a = draw(st.integers(0, n))
        b = draw(st.integers(a, n))
        out.append(slice(a, b))
    return tuple(out)


def cuts(draw: st.DrawFn, n: int, parts: int) -> list[int]:
    """Uneven cut points, empty pieces included."""
    return [0, *sorted(draw(st.integers(0, n)) for _ in range(parts - 1)), n]


def flat_pieces(draw: st.DrawFn, x: np.ndarray) -> LazyTensor:
    """ZeRO: the flattened tensor in ranks' buffers with other data around it."""
    flat = x.reshape(-1)
    edges = cuts(draw, flat.size, draw(st.integers(1, 4)))
    pieces = []
    for a, b in itertools.pairwise(edges):
        before = draw(st.integers(0, 5))
        buffer = np.concatenate([np.full(before, -1, x.dtype), flat[a:b], np.full(3, -2, x.dtype)])
        pieces.append(from_array(buffer).slice([slice(before, before + b - a)]))
    return concat(pieces).reshape(x.shape)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[np.ndarray, LazyTensor]:
    """A tensor cut by TP on a random dim, each shard cut by ZeRO into flat ranges or stored
    strided.
    """
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    x = make(shape)
    axis = draw(st.integers(0, len(shape) - 1))
    edges = cuts(draw, shape[axis], draw(st.integers(1, 4)))
    shards = []
    for a, b in itertools.pairwise(edges):
        piece = np.take(x, range(a, b), axis=axis)
        kind = draw(st.sampled_from(["zero", "transposed", "plain"]))
        if kind == "zero" and piece.size:
            shards.append(flat_pieces(draw, piece))
        elif kind == "transposed":
            shards.append(from_array(piece.T).permute(tuple(reversed(range(x.ndim)))))
        else:
            shards.append(from_array(piece))
    return x, concat(shards, axis)


def check(draw: st.DrawFn, lazy: LazyTensor, x: np.ndarray) -> None:
    assert lazy.shape == x.shape
    np.testing.assert_array_equal(lazy.read(), x)
    region = draw(regions(x.shape))
    np.testing.assert_array_equal(lazy.read(region), x[region])
    np.testing.assert_array_equal(lazy.slice(region).read(), x[region])


@given(tilings(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_tiling_reads_like_numpy(
    case: tuple[np.ndarray, LazyTensor], data: st.DataObject
) -> None:
    x, lazy = case
    assert isinstance(lazy, Chunked)
    check(data.draw, lazy, x)


@st.composite
def factorings(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    dims = []
    while size > 1:
        d = draw(st.sampled_from([k for k in range(1, size + 1) if size % k == 0]))
        dims.append(d)
        size //= d
    for _ in range(draw(st.integers(0, 1))):
        dims.insert(draw(st.integers(0, len(dims))), 1)
    return tuple(dims)


@given(tilings(), st.data())
@settings(max_examples=200, deadline=None)
def test_movement_chains_equal_numpy(
    case: tuple[np.ndarray, LazyTensor], data: st.DataObject
) -> None:
    x, lazy = case
    for _ in range(data.draw(st.integers(1, 5))):
        op = data.draw(st.sampled_from(["reshape", "permute", "slice", "map", "concat"]))
        if op == "reshape" and x.size:
            shape = data.draw(factorings(x.size))
            x, lazy = x.reshape(shape), lazy.reshape(shape)
        elif op == "permute":
            axes = data.draw(st.permutations(range(x.ndim)))
            x, lazy = x.transpose(axes), lazy.permute(axes)
        elif op == "slice" and x.ndim:
            region = data.draw(regions(x.shape))
            x, lazy = x[region], lazy.slice(region)
        elif op == "map":
            x, lazy = x * 2 + 1, lazy.map(lambda v: v * 2 + 1)
        elif op == "concat" and x.ndim:
            axis = data.draw(st.integers(0, x.ndim - 1))
            other = lazy.map(np.negative) if data.draw(st.booleans()) else lazy
            x = np.concatenate([x, other.read()], axis)
            lazy = concat([lazy, other], axis)
    check(data.draw, lazy, x)


def test_head_permutation_stays_exact_and_does_not_shatter() -> None:
    x = make((8 * 64, 16))
    lazy = from_array(x).reshape((8, 2, 32, 16)).permute((0, 2, 1, 3)).reshape((8 * 64, 16))
    expected = x.reshape(8, 2, 32, 16).swapaxes(1, 2).reshape(x.shape)
    np.testing.assert_array_equal(lazy.read(), expected)
    np.testing.assert_array_equal(lazy.read((slice(70, 130),)), expected[70:130])


def test_fused_qkv_split_stays_a_short_chunk_list() -> None:
    groups, r, d, h = 4, 3, 8, 16
    x = make((groups * (r + 2) * d, h))
    halves = concat([from_array(x[:70]), from_array(x[70:])])
    q = halves.reshape((groups, r + 2, d, h)).slice((slice(None), slice(0, r))).reshape((-1, h))
    assert isinstance(q, Chunked)
    assert len(q.chunks) <= 3 * groups
    np.testing.assert_array_equal(q.read(), x.reshape(groups, r + 2, d, h)[:, :r].reshape(-1, h))


class CountingSource(MemorySource):
    read_bytes = 0

    def readinto(self, offset: int, buffer: memoryview) -> None:
        CountingSource.read_bytes += len(buffer)
        MemorySource.readinto(self, offset, buffer)


@pytest.mark.parametrize("region", [(slice(5, 6),), (slice(None), slice(3, 4))])
def test_one_row_or_column_reads_little(region: tuple[slice, ...]) -> None:
    x = make((4096, 4096))
    source = CountingSource(Path("x"), x.tobytes())
    lazy = Chunked.contiguous(source, 0, x.shape, x.dtype)
    CountingSource.read_bytes = 0
    np.testing.assert_array_equal(lazy.read(region), x[region])
    assert CountingSource.read_bytes <= x.nbytes // 100


def test_big_strided_pieces_go_through_small_scratch(tmp_path: Path) -> None:
    x = make((3000, 2000))
    path = tmp_path / "x.bin"
    path.write_bytes(b"abc" + x.tobytes())
    lazy = Chunked.contiguous(FileSource.of(path), 3, x.shape, x.dtype)
    both = concat(
        [lazy.slice((slice(None), slice(1000, 2000))), lazy.slice((slice(None), slice(0, 1000)))], 1
    )
    np.testing.assert_array_equal(both.read(), np.concatenate([x[:, 1000:], x[:, :1000]], 1))
    np.testing.assert_array_equal(lazy.permute((1, 0)).read(), x.T)


def test_stack_adds_a_dim() -> None:
    x = make((3, 4))
    np.testing.assert_array_equal(
        stack([from_array(x), from_array(x + 1)]).read(), np.stack([x, x + 1])
    )


def test_join_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="cannot join"):
        concat([from_array(make((2, 3))), from_array(make((2, 4)))], 0)
    with pytest.raises(ValueError, match="cannot join"):
        concat([from_array(make((2, 3))), from_array(make((2, 3), "float16"))], 0)
