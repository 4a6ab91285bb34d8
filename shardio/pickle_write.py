"""A small pickle emitter: what checkpoints need, and nothing is imported for it.

Writes protocol 2 (CPython's ``pickletools``), which torch's ``weights_only`` loader reads. Classes
and functions are given by name, so files can name torch and DeepSpeed classes on machines without
them. Equal objects give equal bytes; tensors and other foreign values are handed to the caller.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ..errors import UnsupportedError
from . import dtypes

Lower = Callable[[Any], Any]

_BATCH = 1000  # items per SETITEMS or APPENDS, as CPython does


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function: ``Name("torch", "FloatStorage")``."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """The result of calling a function with arguments (REDUCE)."""

    function: Name
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of a class made without its ``__init__`` (NEWOBJ), then given its state (BUILD)."""

    cls: Name
    state: Any = None


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict whose keys are values of this module; the pairs may be made while they are written."""

    items: Iterable[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Persistent:
    """A persistent id: what torch writes for a storage."""

    pid: Any


def torch_size(shape: Iterable[int]) -> Call:
    """A ``torch.Size``."""
    return Call(Name("torch", "Size"), (tuple(int(n) for n in shape),))


def namespace(values: dict[str, Any]) -> Instance:
    """An ``argparse.Namespace`` with these attributes."""
    return Instance(Name("argparse", "Namespace"), dict(values))


def dumps(root: Any, lower: Lower | None = None) -> bytes:
    """Return the pickle of a tree of plain data and the values above.

    Args:
        root: None, bool, int, float, str, bytes, list, tuple, dict, OrderedDict, set, np.dtype (as
            the torch dtype), numpy scalars (as numbers), and the classes of this module.
        lower: turns any other value into one of these.

    Raises:
        UnsupportedError: a value of another kind.
    """
    emitter = _Emitter(lower)
    emitter.out += b"\x80\x02"
    emitter.save(root)
    emitter.out += b"."
    return bytes(emitter.out)


class _Emitter:
    """Appends opcodes; strings and names are memoized, as they repeat most."""

    def __init__(self, lower: Lower | None) -> None:
        self.out = bytearray()
        self.lower = lower
        self.memo: dict[object, int] = {}

    def save(self, value: Any) -> None:
        writer = _WRITERS.get(type(value))
        if writer is not None:
            writer(self, value)
        elif isinstance(value, np.dtype):
            self.name(Name("torch", dtypes.name(value)))
        elif isinstance(value, np.generic):
            self.save(value.item())
        elif self.lower is not None:
            self.save(self.lower(value))
        else:
            raise UnsupportedError(f"a value of type {type(value).__name__} cannot be pickled")

    def remembered(self, key: object) -> bool:
        """Emit a reference when the key is known."""
        at = self.memo.get(key)
        if at is None:
            return False
        self.out += b"h" + bytes([at]) if at < 256 else b"j" + struct.pack("<I", at)
        return True

    def remember(self, key: object) -> None:
        """Give the value on top of the stack a number."""
        at = self.memo[key] = len(self.memo)
        self.out += b"q" + bytes([at]) if at < 256 else b"r" + struct.pack("<I", at)

    def constant(self, value: bool | None) -> None:
        self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif 0 <= value < 65536:
            self.out += b"M" + struct.pack("<H", value)
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(raw) > 255:
                raise UnsupportedError(f"an integer of {len(raw)} bytes cannot be pickled")
            self.out += b"\x8a" + bytes([len(raw)]) + raw

    def real(self, value: float) -> None:
        self.out += b"G" + struct.pack(">d", value)

    def text(self, value: str) -> None:
        if not self.remembered(value):
            raw = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(raw)) + raw
            self.remember(value)

    def blob(self, value: bytes) -> None:
        """Protocol 2 has no bytes: as CPython, text that is encoded when it is read."""
        self.call(Call(Name("_codecs", "encode"), (value.decode("latin-1"), "latin1")))

    def name(self, value: Name) -> None:
        if not self.remembered(value):
            self.out += f"c{value.module}\n{value.name}\n".encode()
            self.remember(value)

    def call(self, value: Call) -> None:
        self.name(value.function)
        self.sequence(value.args)
        self.out += b"R"

    def instance(self, value: Instance) -> None:
        self.name(value.cls)
        self.out += b")\x81"
        if value.state is not None:
            self.save(value.state)
            self.out += b"b"

    def persistent(self, value: Persistent) -> None:
        self.save(value.pid)
        self.out += b"Q"

    def sequence(self, value: tuple[Any, ...]) -> None:
        if len(value) > 3:
            self.out += b"("
        for item in value:
            self.save(item)
        self.out += (b")", b"\x85", b"\x86", b"\x87")[len(value)] if len(value) <= 3 else b"t"

    def mutable(self, value: list[Any]) -> None:
        self.out += b"]"
        for at in range(0, len(value), _BATCH):
            self.out += b"("
            for item in value[at : at + _BATCH]:
                self.save(item)
            self.out += b"e"

    def unordered(self, value: set[Any]) -> None:
        self.call(Call(Name("builtins", "set"), (sorted(value, key=repr),)))

    def mapping(self, value: dict[Any, Any]) -> None:
        self.out += b"}"
        self.items(value.items())

    def ordered(self, value: OrderedDict[Any, Any]) -> None:
        self.name(Name("collections", "OrderedDict"))
        self.out += b")R"
        self.items(value.items())

    def pairs(self, value: Pairs) -> None:
        self.out += b"}"
        self.items(value.items)

    def items(self, items: Iterable[tuple[Any, Any]]) -> None:
        pairs = iter(items)
        while batch := list(islice(pairs, _BATCH)):
            self.out += b"("
            for key, item in batch:
                self.save(key)
                self.save(item)
            self.out += b"u"


_WRITERS: dict[type, Callable[[_Emitter, Any], None]] = {
    type(None): _Emitter.constant,
    bool: _Emitter.constant,
    int: _Emitter.integer,
    float: _Emitter.real,
    str: _Emitter.text,
    bytes: _Emitter.blob,
    tuple: _Emitter.sequence,
    list: _Emitter.mutable,
    set: _Emitter.unordered,
    dict: _Emitter.mapping,
    OrderedDict: _Emitter.ordered,
    Name: _Emitter.name,
    Call: _Emitter.call,
    Instance: _Emitter.instance,
    Pairs: _Emitter.pairs,
    Persistent: _Emitter.persistent,
}
