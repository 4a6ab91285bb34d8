"""assemble(cut(x)) == x for every placement and product of placements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.errors import LayoutError
from mconv.shardio.placement import Flat, Fused, Placement, Replicate, Shard, Stage
from mconv.shardio.tensor import LazyTensor, from_array


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, Placement, int]:
    world = draw(st.integers(1, 5))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    kind = draw(st.sampled_from(["replicate", "shard", "even", "fused", "flat"]))
    dim = draw(st.integers(0, len(shape) - 1))
    placement: Placement = Replicate()
    if kind == "shard":
        placement = Shard(dim)
    elif kind == "even":
        shape = (*shape[:dim], shape[dim] * world, *shape[dim + 1 :])
        placement = Shard(dim, even=True)
    elif kind == "fused":
        widths = tuple(world * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3))))
        shape = (*shape[:dim], sum(widths), *shape[dim + 1 :])
        placement = Fused(dim, widths)
    elif kind == "flat":
        placement = Flat()
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape), placement, world


@given(cases())
@settings(max_examples=150, deadline=None)
def test_assemble_undoes_cut(case: tuple[np.ndarray, Placement, int]) -> None:
    x, placement, world = case
    parts = [placement.cut(from_array(x), r, world) for r in range(world)]
    np.testing.assert_array_equal(placement.assemble(parts, x.shape).read(), x)


@given(cases(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_a_tensor_parallel_shard_cut_again_by_zero_is_one_expression(
    case: tuple[np.ndarray, Placement, int], dp: int
) -> None:
    x, placement, world = case
    whole: list[LazyTensor] = []
    for r in range(world):
        shard = placement.cut(from_array(x), r, world)
        flats = [Flat().cut(shard, d, dp) for d in range(dp)]
        whole.append(Flat().assemble(flats, shard.shape))
    np.testing.assert_array_equal(placement.assemble(whole, x.shape).read(), x)


def test_gate_and_up_are_cut_apart() -> None:
    gate, up = np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)
    part = Fused(0, (4, 4)).cut(from_array(np.concatenate([gate, up])), 1, 2)
    np.testing.assert_array_equal(part.read()[:, 0], [0, 0, 1, 1])


def test_uneven_sizes_are_refused_where_the_framework_refuses_them() -> None:
    with pytest.raises(LayoutError, match="size 5 cannot be cut into 2"):
        Shard(0, even=True).cut(from_array(np.zeros(5, np.float32)), 0, 2)


def test_a_stage_holds_the_whole_tensor() -> None:
    x = from_array(np.zeros(3, np.float32))
    assert Stage(1).assemble([Stage(1).cut(x, 1, 2)]) is x
