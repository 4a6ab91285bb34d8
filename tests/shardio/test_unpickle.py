"""The restricted unpickler on honest pickles: plain data as it was, classes as Records."""

from __future__ import annotations

import argparse
import collections
import decimal
import enum
import functools
import io
import pathlib
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.errors import FormatError
from mconv.shardio.records import Global, Record
from mconv.shardio.unpickle import load_prefix, loads

from .pickle_code import call, glob, num, stop, text, tup

PROTOCOLS = range(6)


class Color(enum.Enum):
    RED = "red"


class Plain:
    def __init__(self) -> None:
        self.width = 3
        self.owner = self


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self) -> None:
        self.left, self.right = 1, [2]


class MyList(list):
    pass


class MyDict(dict):
    pass


class Point(collections.namedtuple("Point", "x y")):
    pass


def load(data: bytes) -> object:
    return loads(data, where="f.pt")


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
_keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.dictionaries(_keys, inner, max_size=5)
        | st.sets(st.integers(), max_size=4)
        | st.frozensets(st.text(), max_size=4)
    ),
    max_leaves=25,
)


@settings(max_examples=150, deadline=None)
@given(_values, st.sampled_from(PROTOCOLS))
def test_plain_data_is_the_same_as_with_pickle(value: object, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.OrderedDict(a=1, b=2), {"a": 1, "b": 2}),
        (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (complex(1, -2), complex(1, -2)),
        (slice(1, None, 2), slice(1, None, 2)),
        (bytearray(b"xyz\xff"), bytearray(b"xyz\xff")),
        (b"\x00\xff" * 300, b"\x00\xff" * 300),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (pathlib.PureWindowsPath("C:/a"), "C:\\a"),
        ([1.5, float("inf"), -(2**70), 2**2000], [1.5, float("inf"), -(2**70), 2**2000]),
        ("tab\t'\"\\ \u20ac \U0001f600\n", "tab\t'\"\\ \u20ac \U0001f600\n"),
    ],
)
def test_known_constructors(value: object, expected: object, protocol: int) -> None:
    got = load(pickle.dumps(value, protocol))
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array([], dtype=np.int8),
        np.array(5, dtype=">i4"),
        np.array([True, False]),
        np.float64(2.5),
        np.int16(-3),
        np.bool_(True),
        np.arange(3, dtype=np.complex64),
        np.arange(3).astype(ml_dtypes.bfloat16),
    ],
    ids=str,
)
def test_numpy_values(value: np.ndarray, protocol: int) -> None:
    got = load(pickle.dumps([value, value], protocol))
    assert isinstance(got, list)
    assert got[0] is got[1]
    assert got[0].dtype == value.dtype
    np.testing.assert_array_equal(got[0], value)


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([{}], dtype=object)], ids=repr)
def test_other_numpy_arrays_stay_records(value: np.ndarray) -> None:
    got = load(pickle.dumps(value))
    assert isinstance(got, Record)
    assert got.name == "numpy.ndarray"
    assert isinstance(got.state, tuple)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unknown_classes_become_records(protocol: int) -> None:
    obj = Plain()
    got = load(pickle.dumps({"a": obj, "b": obj, "ns": argparse.Namespace(tp=2)}, protocol))
    assert isinstance(got, dict)
    assert isinstance(got["a"], Record)
    assert got["a"] is got["b"]
    assert got["a"].name == f"{__name__}.Plain"
    assert got["a"].width == 3
    assert got["a"].owner is got["a"]
    assert got["ns"].name == "argparse.Namespace"
    assert got["ns"].fields == {"tp": 2}
    assert got["ns"].get("pp", 1) == 1
    with pytest.raises(AttributeError, match="has no field 'pp'"):
        _ = got["ns"].pp


@pytest.mark.parametrize("protocol", PROTOCOLS[2:])
def test_record_parts(protocol: int) -> None:
    listed, mapped = MyList([1, 2]), MyDict(a=1)
    values = [Color.RED, Slotted(), listed, mapped, Point(1, 2), io.BytesIO(b"raw"), Color]
    got = load(pickle.dumps(values, protocol))
    assert isinstance(got, list)
    assert got[0].args == ("red",)
    assert got[1].fields == {"left": 1, "right": [2]}
    assert got[2].items == [1, 2]
    assert got[3].mapping == {"a": 1}
    assert got[4].args == (1, 2)
    assert got[5].name == "io.BytesIO"
    assert got[5].state[0] == b"raw"
    assert type(got[6]) is Global
    assert got[6].name == f"{__name__}.Color"


def test_functions_and_reductions_are_only_stored() -> None:
    got = load(pickle.dumps([functools.partial(print, 1), decimal.Decimal("1.5"), print]))
    assert isinstance(got, list)
    assert got[0].name == "functools.partial"
    assert got[1].args == ("1.5",)
    assert got[2].name == "builtins.print"


def test_old_module_paths_and_dtypes() -> None:
    path = b"\x80\x02" + glob("torch.distributed._tensor.placement_types", "Shard") + b")\x81."
    got = load(path)
    assert isinstance(got, Record)
    assert got.name == "torch.distributed.tensor.placement_types.Shard"
    assert load(stop(glob("torch", "float16"))) == np.dtype(np.float16)
    assert load(stop(call("pathlib._local", "PosixPath", text("/a"), text("b")))) == "/a/b"
    assert load(stop(call("torch", "device", text("cuda"), num(1)))) == "cuda:1"
    assert load(stop(glob("torch", "qint8"))).name == "torch.qint8"  # type: ignore[attr-defined]


def test_nested_names_through_getattr() -> None:
    got = load(stop(call("builtins", "getattr", glob("m", "Outer"), text("Inner")) + b")R"))
    assert isinstance(got, Record)
    assert got.name == "m.Outer.Inner"


def test_persistent_ids() -> None:
    body = stop(tup(text("storage"), num(3)) + b"Q")
    assert loads(body, where="f", persistent_load=lambda pid: ["seen", pid]) == [
        "seen",
        ("storage", 3),
    ]
    with pytest.raises(FormatError, match="outside the pickle"):
        load(body)


def test_prefix_reports_its_length() -> None:
    data = pickle.dumps([1]) + pickle.dumps("next")
    value, used = load_prefix(data, where="f")
    assert value == [1]
    assert load(data[used:]) == "next"


def test_records_never_offer_protocol_attributes() -> None:
    """numpy would follow ``__array_interface__`` of an instance to any address."""
    state = tup(text("x")) + b"0}" + text("__array_interface__") + b"}" + b"s"
    got = load(stop(glob("m", "A") + b")\x81" + state + b"b"))
    assert isinstance(got, Record)
    assert "__array_interface__" in got.fields
    with pytest.raises(AttributeError):
        _ = got.__array_interface__
    assert np.asarray(got).dtype == object
