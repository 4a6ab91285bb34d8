"""The pickle emitter against CPython's own unpickler and against ours."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mconv.errors import UnsupportedError
from mconv.shardio.pickle_write import Call, Instance, Name, Pairs, dumps, namespace, torch_size
from mconv.shardio.unpickle import loads

KEYS = st.text(max_size=6) | st.integers(-(2**70), 2**70)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=30,
)


@given(TREES)
def test_pickle_gives_it_back(tree: Any) -> None:
    back = pickle.loads(dumps(tree))
    assert repr(back) == repr(tree)


@given(TREES)
def test_our_reader_agrees(tree: Any) -> None:
    assert loads(dumps(tree), where="test") == tree


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2500])
def test_long_containers_come_in_batches(count: int) -> None:
    tree = {"list": list(range(count)), "dict": {str(k): k for k in range(count)}}
    assert pickle.loads(dumps(tree)) == tree


def test_many_strings_need_long_references() -> None:
    tree = [str(k) for k in range(700)] * 2
    data = dumps(tree)
    assert pickle.loads(data) == tree
    assert len(data) < len(dumps([str(k) for k in range(1400)]))


def test_named_objects() -> None:
    assert pickle.loads(dumps(namespace({"tp": 2, "lr": [1.5]}))) == argparse.Namespace(
        tp=2, lr=[1.5]
    )
    assert pickle.loads(dumps(Call(Name("builtins", "complex"), (1.0, 2.0)))) == 1 + 2j
    assert pickle.loads(dumps({3, 1, 2})) == {1, 2, 3}
    pairs = Pairs(((Call(Name("builtins", "complex"), (0.0, 1.0)), "i"),))
    assert pickle.loads(dumps(pairs)) == {1j: "i"}
    error = pickle.loads(dumps(Instance(Name("argparse", "Namespace"))))
    assert vars(error) == {}


def test_torch_values() -> None:
    torch = pytest.importorskip("torch")
    assert pickle.loads(dumps(torch_size((2, 3)))) == torch.Size([2, 3])
    assert pickle.loads(dumps(np.dtype(np.float32))) is torch.float32
    assert pickle.loads(dumps(np.float32(1.5))) == 1.5


def test_foreign_values_are_lowered_or_refused() -> None:
    assert pickle.loads(dumps([range(3)], lower=list)) == [[0, 1, 2]]
    with pytest.raises(UnsupportedError, match="range"):
        dumps([range(3)])
    with pytest.raises(UnsupportedError, match="integer"):
        dumps(1 << 4000)
