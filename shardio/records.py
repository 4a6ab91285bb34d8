"""Inert values that the safe unpickler builds instead of live Python objects.

``Record`` stands for an instance of any class, ``Global`` for a class or function that was only
named, ``StoredTensor`` and ``Storage`` for a tensor that lies in a file. None of them can run
code, and none of them compares or hashes by content, so hostile nesting cannot make a hash or a
comparison expensive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..errors import FormatError, UnsupportedError

MAX_DEPTH = 500
_MAX_VISITS = 1_000_000
_MAX_DIMS = 64
_MAX_REPEATED = 1 << 30  # bytes of a tensor that is larger than what it views

_EXOTIC = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized torch tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor (it has no data)",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device without storages",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a device without storages",
    "torch._utils._rebuild_tensor_v2": "a lazily conjugated or negated tensor",
    "torch._utils._rebuild_tensor_v3": "a tensor of a dtype that numpy lacks, or a lazy conjugate",
}


class Global:
    """A class or function that a pickle names. ``name`` is qualified: ``torch.Size``.

    ``build`` is our harmless constructor for it (guard, args -> value), None for unknown names.
    """

    __slots__ = ("build", "name")

    def __init__(
        self, name: str, build: Callable[[Any, tuple[Any, ...]], object] | None = None
    ) -> None:
        self.name = name
        self.build = build

    def __repr__(self) -> str:
        return f"<Global {self.name[:200]!r}>"


class Record:
    """An instance of a class that was not (and never is) imported: its parts as plain data.

    Attributes:
        name: qualified name of the class or function, ``argparse.Namespace``.
        args: what the pickle passed to it. An enum member has its value in ``args[0]``.
        kwargs: keyword arguments (rare).
        state: what ``__setstate__`` would have received; mostly the attribute dict.
        items: elements appended, when the class is a list.
        mapping: entries set, when the class is a dict.

    Any other attribute is looked up in the state: ``record.tensor_data``. Use ``get`` for fields
    that may be missing or whose names collide with the ones above.
    """

    __slots__ = ("args", "items", "kwargs", "mapping", "name", "state")

    def __init__(self, name: str, args: object = ()) -> None:
        self.name = name
        self.args: tuple[object, ...] = args if type(args) is tuple else (args,)
        self.kwargs: dict[str, object] | None = None
        self.state: object = None
        self.items: list[object] | None = None
        self.mapping: dict[object, object] | None = None

    @property
    def fields(self) -> dict[str, object]:
        """The attribute dict, empty when the class kept its state in another form."""
        return cast("dict[str, object]", self.state) if type(self.state) is dict else {}

    def get(self, name: str, default: object = None) -> object:
        """Return one field of the state, or ``default``."""
        return self.fields.get(name, default)

    def __getattr__(self, name: str) -> object:
        state = self.state
        # Protocol names (__array_interface__...) must never come from a file.
        if type(state) is dict and name in state and not name.startswith("__"):
            return state[name]
        raise AttributeError(f"{self.name[:200]!r} has no field {name!r}")

    def __repr__(self) -> str:
        return f"<Record {self.name[:200]!r}>"


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of bytes in a file that tensors view.

    Attributes:
        key: name within the file (zip entry or legacy storage key).
        dtype: element type; uint8 for untyped storages. Always native byte order.
        nbytes: length in bytes.
        offset: first byte, counted from the start of ``path``.
        path: the file.
        big_endian: the bytes must be swapped after reading.
    """

    key: str
    dtype: np.dtype
    nbytes: int
    offset: int
    path: Path
    big_endian: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor as a strided view of a storage; validated to stay inside it.

    Attributes:
        dtype: element type, native byte order (``storage.big_endian`` tells what lies in the file).
        shape: sizes.
        strides: in elements, none negative.
        storage_offset: first element, in elements of ``dtype`` from the start of the storage.
        storage: the bytes.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int
    storage: Storage

    @property
    def file_offset(self) -> int:
        """Byte position of the first element in the file."""
        return self.storage.offset + self.storage_offset * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def span(self) -> int:
        """Elements from the first to the last one touched, inclusive; 0 when empty."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True


def make_tensor(
    storage: Storage, dtype: np.dtype, offset: object, shape: object, strides: object
) -> StoredTensor:
    """Build a StoredTensor from unpickled values after checking every number.

    Raises:
        FormatError: wrong types, negative numbers, or a view that leaves its storage.
    """
    where = f"{storage.path}: storage {storage.key!r}"
    start = _sizes((offset,), where)[0]
    sizes, steps = _sizes(shape, where), _sizes(strides, where)
    if len(sizes) != len(steps) or len(sizes) > _MAX_DIMS:
        raise FormatError(f"{where}: a tensor has {len(sizes)} sizes but {len(steps)} strides")
    tensor = StoredTensor(dtype, sizes, steps, start, storage)
    need = (start + tensor.span) * dtype.itemsize
    if tensor.numel > tensor.span and tensor.numel * dtype.itemsize > _MAX_REPEATED:
        raise FormatError(f"{where}: a tensor of shape {_brief(sizes)} repeats few elements")
    if need > storage.nbytes:
        raise FormatError(
            f"{where}: a tensor of shape {_brief(sizes)} (offset {start}, strides {_brief(steps)}, "
            f"{dtype}) needs {need} bytes, but the storage has {storage.nbytes}"
        )
    return tensor


def _sizes(values: object, where: str) -> tuple[int, ...]:
    if type(values) not in (tuple, list):
        raise FormatError(f"{where}: a tensor's shape or strides are not a tuple of integers")
    numbers = cast("tuple[int, ...] | list[int]", values)
    for n in numbers:
        if type(n) is not int or not 0 <= n < 2**63:
            raise FormatError(f"{where}: a tensor has an offset, size or stride that is no size")
    return tuple(numbers)


def _brief(sizes: tuple[int, ...]) -> str:
    return str(list(sizes[:8])) + ("..." if len(sizes) > 8 else "")


def exotic_kind(value: object) -> str | None:
    """Say which unreadable kind of torch tensor a Record is ("a sparse tensor"), or None."""
    return _EXOTIC.get(value.name) if type(value) is Record else None


def children(node: object) -> list[tuple[object, object]] | None:
    """Return (key, child) pairs of a container or Record; None for leaves."""
    if type(node) is dict:
        return list(node.items())
    if type(node) is list or type(node) is tuple:
        return list(enumerate(cast("list[object]", node)))
    if type(node) is not Record:
        return None
    found: list[tuple[object, object]] = list(enumerate(node.args))
    for part, key in ((node.state, "state"), (node.mapping, "mapping"), (node.items, "items")):
        if type(part) is dict:
            found += part.items()
        elif part is not None:
            found.append((key, part))
    return found


class _Walk:
    """Iterative walk; only what was seen to hold tensors is walked a second time."""

    def __init__(self) -> None:
        self.again = 0  # elements visited more than once
        self.found = 0  # tensors so far
        self.seen: set[int] = set()
        self.barren: set[int] = set()  # containers without tensors below
        self.stack: list[tuple[object, Iterator[tuple[object, object]], int]] = []
        self.path: list[object] = []

    def enter(self, node: object, pairs: list[tuple[object, object]]) -> None:
        if id(node) in self.seen:
            self.again += 1 + len(pairs)
        self.seen.add(id(node))
        if len(self.stack) >= MAX_DEPTH or self.again > _MAX_VISITS:
            raise FormatError("the unpickled data is nested too deeply or repeats itself too often")
        self.stack.append((node, iter(pairs), self.found))

    def leave(self) -> None:
        node, _, found_before = self.stack.pop()
        if self.found == found_before:
            self.barren.add(id(node))
        if self.path:
            self.path.pop()


def _dotted(path: list[object], key: object) -> str:
    parts = [str(p)[:100] if type(p) in (str, int) else f"({type(p).__name__})" for p in path]
    return repr(".".join([*parts, str(key)[:100] if type(key) in (str, int) else "?"]))


def walk_tensors(
    root: object, *, skip_exotic: bool = False
) -> Iterator[tuple[tuple[object, ...], StoredTensor]]:
    """Yield (path, tensor) for every tensor below dicts, lists, tuples and Records, in file order.

    A path has one entry per level: dict keys, list indices, Record field names. A tensor that is
    reachable by two paths (tied weights) is yielded twice. Cycles are cut.

    Args:
        root: an unpickled object.
        skip_exotic: pass over sparse, quantized and similar tensors instead of refusing them.

    Raises:
        FormatError: deeper than 500 levels, or shared substructures repeated millions of times.
        UnsupportedError: a tensor of a kind that mconv cannot read, with its path.
    """
    walk = _Walk()
    if type(root) is StoredTensor:
        yield (), root
    elif pairs := children(root):
        walk.enter(root, pairs)
    while walk.stack:
        for key, child in walk.stack[-1][1]:
            if type(child) is StoredTensor:
                walk.found += 1
                yield (*walk.path, key), child
            elif kind := exotic_kind(child):
                if not skip_exotic:
                    raise UnsupportedError(f"{_dotted(walk.path, key)} is {kind}")
            elif (
                id(child) not in walk.barren
                and (pairs := children(child))
                and not any(child is entry[0] for entry in walk.stack)
            ):
                walk.enter(child, pairs)
                walk.path.append(key)
                break
        else:
            walk.leave()
