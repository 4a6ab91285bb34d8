"""The algebra of the named transforms: each undoes its inverse, and does what numpy says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.convert.movement import deinterleave, interleave
from mconv.convert.naming.transforms import TRANSFORMS, Sizes, zeros
from mconv.shardio.tensor import LazyTensor, from_array

NAMES = sorted(TRANSFORMS)


def sizes_of(draw: st.DrawFn) -> Sizes:
    groups, ratio, pairs = (draw(st.integers(1, 4)) for _ in range(3))
    vocab = draw(st.integers(1, 9))
    return Sizes(
        layers=1,
        heads=groups * ratio,
        kv_heads=groups,
        head_dim=2 * pairs,
        vocab_size=vocab,
        padded_vocab_size=vocab + draw(st.integers(0, 5)),
        experts=draw(st.integers(1, 4)),
        rotary_interleaved=draw(st.booleans()),
        zero_centered_norm=draw(st.booleans()),
    )


def inputs_of(name: str, sizes: Sizes, width: int, bias: bool) -> list[np.ndarray]:
    """What a transform takes, filled with distinct numbers."""
    rows = {
        "split_qkv": (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim,
        "columns_qkv": (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim,
        "split_qkv_blocks": (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim,
        "conv_qkv": (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim,
        "trim_vocab": sizes.padded_vocab_size,
        "deinterleave_q": sizes.heads * sizes.head_dim,
        "deinterleave_k": sizes.kv_heads * sizes.head_dim,
        "unstack_experts": sizes.experts,
    }.get(name, 6)
    count = sizes.experts if name == "stack_experts" else 1
    shape = (rows,) if bias else (rows, width)
    if name.startswith("columns_"):  # matrices only, [in, out]
        shape = (width, rows)
    n = int(np.prod(shape))
    return [
        (np.arange(n, dtype=np.float32) + 1000 * k).reshape(shape).astype(ml_dtypes.bfloat16)
        if n < 200
        else (np.arange(n, dtype=np.float32) + 1000 * k).reshape(shape)
        for k in range(count)
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Sizes, list[np.ndarray]]:
    name = draw(st.sampled_from(NAMES))
    sizes = sizes_of(draw)
    return name, sizes, inputs_of(name, sizes, draw(st.integers(1, 4)), draw(st.booleans()))


def read(tensors: list[LazyTensor]) -> list[np.ndarray]:
    return [t.read() for t in tensors]


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_inverse_undoes_forward(case: tuple[str, Sizes, list[np.ndarray]]) -> None:
    name, sizes, arrays = case
    transform = TRANSFORMS[name]
    there = transform.forward([from_array(a) for a in arrays], sizes)
    back = read(transform.inverse(there, sizes))
    if name == "trim_vocab":
        arrays = [a.copy() for a in arrays]
        arrays[0][sizes.vocab_size :] = 0
    assert len(back) == len(arrays)
    for a, b in zip(arrays, back, strict=True):
        assert a.shape == b.shape
        assert np.array_equal(a.astype(np.float32), b.astype(np.float32))
    again = read(transform.forward(transform.inverse(there, sizes), sizes))
    assert all(np.array_equal(a, b) for a, b in zip(read(there), again, strict=True))


@pytest.mark.parametrize(("groups", "ratio"), [(1, 4), (2, 2), (4, 1)])
def test_qkv_rows_are_those_of_the_groups(groups: int, ratio: int) -> None:
    d, h = 4, 3
    sizes = Sizes(
        layers=1,
        heads=groups * ratio,
        kv_heads=groups,
        head_dim=d,
        vocab_size=1,
        padded_vocab_size=1,
    )
    w = np.random.default_rng(0).normal(size=(groups * (ratio + 2) * d, h)).astype(np.float32)
    view = w.reshape(groups, ratio + 2, d, h)
    q, k, v = read(TRANSFORMS["split_qkv"].forward([from_array(w)], sizes))
    assert np.array_equal(q, view[:, :ratio].reshape(-1, h))
    assert np.array_equal(k, view[:, ratio].reshape(-1, h))
    assert np.array_equal(v, view[:, ratio + 1].reshape(-1, h))
    (conv,) = read(TRANSFORMS["conv_qkv"].forward([from_array(w)], sizes))
    assert np.array_equal(conv, np.concatenate([q, k, v]).T)


def test_interleaving_pairs_the_halves() -> None:
    halves = np.arange(8)  # two heads of four rows: halves (0, 1) and (2, 3)
    pairs = interleave(from_array(halves), 2)
    assert pairs.read().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert deinterleave(pairs, 2).read().tolist() == halves.tolist()


def test_zeros_take_no_memory() -> None:
    big = zeros((1 << 40, 8), np.dtype(np.float32))
    assert not big.slice([slice(0, 4)]).read().any()


def test_zero_centered_norms_keep_small_values() -> None:
    sizes = Sizes(
        layers=1, heads=1, kv_heads=1, head_dim=2, vocab_size=1, padded_vocab_size=1,
        zero_centered_norm=True,
    )  # fmt: skip
    stored = np.array([0.001, -0.5, 2.0], np.float32).astype(ml_dtypes.bfloat16)
    (found,) = TRANSFORMS["norm"].forward([from_array(stored)], sizes)
    assert found.dtype == np.float32
    assert np.array_equal(found.read(), stored.astype(np.float32) + 1)
    assert TRANSFORMS["norm"].changes_values


@pytest.mark.parametrize("name", ["split_qkv", "split_gate_up", "trim_vocab", "deinterleave_q"])
def test_misfits_are_refused(name: str) -> None:
    sizes = Sizes(
        layers=1, heads=2, kv_heads=1, head_dim=4, vocab_size=9, padded_vocab_size=9, experts=2
    )
    with pytest.raises(ValueError, match="rows"):
        TRANSFORMS[name].forward([from_array(np.zeros((7, 2), np.float32))], sizes)
