"""The restricted unpickler on hostile pickles: no code is reached, no bomb goes off."""

from __future__ import annotations

import collections
import enum
import pathlib
import pickle
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
from mconv.errors import FormatError
from mconv.shardio.records import Record
from mconv.shardio.unpickle import loads

from .pickle_code import call, glob, num, stop, text, tup


class Color(enum.Enum):
    RED = "red"


class Plain:
    def __init__(self) -> None:
        self.width = 3


def load(data: bytes) -> object:
    return loads(data, where="f.pt")


# -- hostile pickles: no code --------------------------------------------------------------------

CALLS = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("__builtin__", "eval"),
    ("builtins", "__import__"),
    ("builtins", "compile"),
    ("builtins", "open"),
    ("subprocess", "Popen"),
    ("runpy", "run_path"),
    ("pickle", "loads"),
    ("copyreg", "_reconstructor.__globals__.clear"),
    ("operator", "attrgetter"),
    ("importlib", "import_module"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch._utils", "__builtins__.eval"),
    ("torch.storage", "_load_from_bytes"),
    ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"),
]


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """Fail the test if anything is executed; the commands would create the returned file."""

    def reached(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"code was reached with {args}")

    for name in ("os.system", "subprocess.Popen", "runpy.run_path", "pickle.loads", "os.popen"):
        monkeypatch.setattr(name, reached)
    for name in ("eval", "exec", "open", "compile", "__import__"):
        monkeypatch.setattr(f"mconv.shardio.pickle_machine.{name}", reached, raising=False)
        monkeypatch.setattr(f"mconv.shardio.pickle_globals.{name}", reached, raising=False)
    return tmp_path / "owned"


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_calls_are_inert(module: str, name: str, canary: pathlib.Path) -> None:
    arg = text(f"touch {canary}")
    programs = [
        glob(module, name) + tup(arg) + b"R",
        text(module) + text(name) + b"\x93" + tup(arg) + b"R",
        glob(module, name) + tup(arg) + b"\x81",
        glob(module, name) + tup(arg) + b"}\x92",
        b"(" + arg + f"i{module}\n{name}\n".encode(),
        b"(" + glob(module, name) + arg + b"o",
        call("builtins", "getattr", glob(module, name), text("__call__")) + tup(arg) + b"R",
        call("functools", "partial", glob(module, name), arg) + b")R",
        glob("m", "A") + b")\x81" + glob(module, name) + b"b",
        glob("m", "A") + b")\x81}" + text("__setstate__") + glob(module, name) + b"sb" + arg + b"b",
        glob("m", "A") + b")\x81}" + text("__class__") + glob(module, name) + b"sb",
        call("collections", "defaultdict", glob(module, name)),
        call("copyreg", "__newobj__", glob(module, name), arg),
        call("copyreg", "_reconstructor", glob(module, name), glob("builtins", "object"), arg),
        call("torch._utils", "_rebuild_parameter", call(module, name, arg)),
        call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            glob(module, name),
            glob("torch", "Tensor"),
            tup(arg),
            b"}",
        ),
    ]
    for program in programs:
        assert load(stop(program)) is not None
    assert not canary.exists()


@pytest.mark.parametrize("target", ["]", "}", "c_codecs\nencode\n", "ctorch\nSize\n", "K\x01"])
def test_build_cannot_patch_what_is_ours(target: str, canary: pathlib.Path) -> None:
    """BUILD with attributes and slots on plain values and on constructors."""
    attributes = b"}" + text("build") + glob("os", "system") + b"s"
    for state in (attributes, b"N" + attributes + b"\x86"):
        data = stop(target.encode("latin-1") + state + b"b" + tup(text("true")) + b"R")
        with pytest.raises(FormatError):
            load(data)
    assert load(stop(call("torch", "Size", b"]"))) == ()


def test_encode_uses_no_other_codec() -> None:
    got = load(stop(call("_codecs", "encode", text("x"), text("zlib_codec"))))
    assert isinstance(got, Record)
    assert load(stop(call("_codecs", "encode", text("\xff"), text("latin1")))) == b"\xff"


# -- hostile pickles: no bombs -------------------------------------------------------------------


_DOUBLING = b"K\x01" + b"2\x86" * 100  # a pair of itself, a hundred times
_GETATTRS = glob("builtins", "getattr") * 200 + glob("m", "A") + (text("x" * 50) + b"\x86R") * 200
_COLLIDING = b"}(" + b"".join(num(i * (2**61 - 1)) + b"N" for i in range(1, 3000)) + b"u"
BOMBS = {
    "extension": b"\x82\x01",
    "extension4": b"\x84\x01\x00\x00\x00",
    "out of band buffer": b"\x97",
    "unknown opcode": b"\xff",
    "protocol": b"\x80\x09N",
    "memo index": b"Nr\xff\xff\xff\xff",
    "memo index text": b"Np99999999999999999999\n",
    "memo missing": b"h\x05",
    "memo missing text": b"g5\n",
    "memo negative": b"Np-1\n",
    "unset memo is past the end": b"j\xff\xff\xff\x7f",
    "string length": b"\x8d" + struct.pack("<Q", 2**62) + b"abc",
    "bytes length": b"\x8e" + struct.pack("<Q", 2**63 - 1) + b"abc",
    "bytearray length": b"\x96" + struct.pack("<Q", 2**40) + b"abc",
    "frame length": b"\x95" + struct.pack("<Q", 2**60) + b"N",
    "long length": b"\x8b" + struct.pack("<I", 2**31 - 1) + b"1",
    "long negative length": b"\x8b" + struct.pack("<i", -1) + b"1",
    "long digits": b"L" + b"9" * 100_000 + b"L\n",
    "float digits": b"F" + b"9" * 100_000 + b"\n",
    "bad int": b"Ix\n",
    "bad utf8": b"\x8c\x02\xff\xff",
    "bytearray by size": call("builtins", "bytearray", num(10**12)),
    "bytes by size": call("builtins", "bytes", num(10**12)),
    "list of a range": call("builtins", "list", call("builtins", "range", num(10**12))),
    "list of a string": call("builtins", "list", text("abc")),
    "tuple of a list of lists": call("builtins", "tuple", b"K\x05"),
    "float of a huge int": call("builtins", "float", num(2**1025)),
    "int of a string": call("builtins", "int", text("9" * 10_000)),
    "string of a record": call("builtins", "str", call("m", "A")),
    "marks": b"(" * 100_000,
    "marks then values": b"(" * 30_000 + b"N" + b"t" * 30_000,
    "deep lists": b"]" * 60_000 + b"a" * 59_999,
    "deep tuples": b")" + b"\x85" * 500_000,
    "deep dicts": b"}" + b"N}" * 30_000 + b"s" * 30_000,
    "deep tuple as key": b"}" + b")" + b"\x85" * 500_000 + b"Ns",
    "deep tuple in a set": b"\x8f(" + b")" + b"\x85" * 500_000 + b"\x90",
    "deep tuple in frozenset": b"(" + b")" + b"\x85" * 500_000 + b"\x91",
    "list in itself": b"]q\x00h\x00a",
    "dict in itself": b"}q\x00Nh\x00s",
    "tuple in its list": b"]q\x00h\x00\x85a",
    "hash bomb": b"}" + _DOUBLING + b"Ns",
    "hash bomb in a set": b"\x8f(" + _DOUBLING + b"\x90",
    "hash bomb in pairs": call("collections", "OrderedDict", b"]" + _DOUBLING + b"N\x86a"),
    "colliding keys": _COLLIDING,
    "unhashable key": b"}]Ns",
    "unhashable in a set": b"\x8f(]\x90",
    "unhashable in a tuple key": b"}]\x85Ns",
    "slice as key": b"}" + call("builtins", "slice", b"N", b"N") + b"Ns",
    "odd items": b"}(NNNu",
    "append to a tuple": b")Na",
    "items on a list": b"]NNs",
    "reduce of a value": b"K\x01)R",
    "reduce without a tuple": glob("m", "A") + b"]R",
    "newobj of text": text("os") + b")\x81",
    "stack_global of numbers": b"K\x01K\x02\x93",
    "pop nothing": b"0",
    "tuple of nothing": b"\x86",
    "build nothing": b"Nb",
    "build a number": b"K\x01}b",
    "no mark": b"t",
    "stack below the mark": b"NN(00t",
    "huge array": call("numpy.core.multiarray", "_reconstruct", glob("numpy", "ndarray"))
    + tup(b"K\x01", tup(num(10**15)), call("numpy", "dtype", text("f8")), b"\x89", b"C\x01x")
    + b"b",
    "array of wrong size": call("numpy.core.multiarray", "_reconstruct", glob("numpy", "ndarray"))
    + tup(b"K\x01", tup(num(3)), call("numpy", "dtype", text("f8")), b"\x89", b"C\x01x")
    + b"b",
    "empty dtype array": call("numpy.core.multiarray", "_reconstruct", glob("numpy", "ndarray"))
    + tup(b"K\x01", tup(num(2**60)), call("numpy", "dtype", text("V1")), b"\x89", b"C\x00")
    + b"b",
    "tensor without storage": call("torch._utils", "_rebuild_tensor_v2", b"N", b"N", b"N", b"N"),
    "tensor with too few": call("torch._utils", "_rebuild_tensor_v2"),
    "parameter of text": call("torch._utils", "_rebuild_parameter", text("x")),
    "long name": glob("a" * 2000, "b"),
    "getattr chain": _GETATTRS,
    "endless sets": b"(" + b"\x8f" * 4_000_000 + b"t",
    "copies": b"](" + b"N" * 20_000 + b"eq\x00" + b"0("
    + (b"cbuiltins\nlist\nh\x00\x85R" * 2_000) + b"l",
    "merged states": b"}(" + b"".join(text(str(i)) + b"N" for i in range(10_000)) + b"uq\x000("
    + (glob("m", "A") + b")R" + b"h\x00h\x00\x86b") * 2_000 + b"l",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_a_format_error(name: str) -> None:
    data = stop(BOMBS[name])
    started = time.process_time()
    with pytest.raises(FormatError, match=r"f\.pt: malformed pickle"):
        load(data)
    assert time.process_time() - started < 20  # a hang, not a benchmark


@pytest.mark.parametrize("name", ["copies", "merged states", "huge array", "memo index"])
def test_bombs_need_little_memory(name: str) -> None:
    data = stop(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            load(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64_000_000


def test_long_chains_of_records_can_be_dropped() -> None:
    """Nesting through Records is data (linked objects); nothing recurses over it."""
    got = load(stop(glob("m", "A") * 100_000 + b")R" + b"\x85R" * 99_999))
    depth, link = 1, got
    while isinstance(link, Record) and link.args:
        depth, link = depth + 1, link.args[0]
    assert depth == 100_000
    assert repr(got) == "<Record 'm.A'>"
    del got, link


def test_every_truncation_is_noticed() -> None:
    data = pickle.dumps({"a": [1, 2.5, "x" * 300, (Plain(),)], "b": b"y" * 300}, 4)
    for cut in range(len(data)):
        with pytest.raises(FormatError):
            load(data[:cut])


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_mutations_raise_format_errors_or_parse(protocol: int, canary: pathlib.Path) -> None:
    rng = random.Random(protocol)
    value = {"t": (1, 2), "n": np.arange(3), "o": Plain(), "p": collections.OrderedDict(a=1)}
    data = pickle.dumps([value, Color.RED, bytearray(b"abc"), 2**70, 1.5], protocol)
    for _ in range(600):
        mutant = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(mutant))
            kind = rng.randrange(4)
            if kind == 0:
                mutant[at] = rng.randrange(256)
            elif kind == 1:
                del mutant[at : at + rng.randint(1, 5)]
            elif kind == 2:
                mutant[at:at] = rng.choice([b"R", b"b", b"\x81", b"(", b"t", b"\x93", b"0", b"2"])
            else:
                other = rng.randrange(len(mutant))
                mutant[at:at] = mutant[other : other + rng.randint(1, 9)]
            if not mutant:
                break
        try:
            load(bytes(mutant))
        except FormatError as e:
            assert str(e).startswith("f.pt: malformed pickle")
