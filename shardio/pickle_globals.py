"""The fixed table of names that the unpickler understands, each with a harmless constructor.

A name outside the table becomes an inert ``Record``. The constructors take exact builtin types
only, charge copies to the guard, and build plain data: OrderedDict and defaultdict give dict,
paths and devices give str. Tensors follow ``torch/_utils.py`` (_rebuild_tensor...); arrays are in
``pickle_numpy``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..errors import UnsupportedError
from . import dtypes
from .pickle_guard import Guard, brief
from .pickle_numpy import latin1, np_dtype, np_frombuffer, np_reconstruct, np_scalar
from .records import Global, Record, Storage, StoredTensor, make_tensor

Args = tuple[Any, ...]
Build = Callable[[Guard, Args], object]

_ALIASES = (
    ("__builtin__.", "builtins."),
    ("exceptions.", "builtins."),
    ("copy_reg.", "copyreg."),
    ("_io.", "io."),
    ("numpy._core.", "numpy.core."),
    ("pathlib._local.", "pathlib."),
    ("torch.distributed._tensor.api.", "torch.distributed.tensor."),
    ("torch.distributed._tensor.placement_types.", "torch.distributed.tensor.placement_types."),
    ("torch.distributed._tensor.", "torch.distributed.tensor."),
    ("torch.distributed.tensor._api.", "torch.distributed.tensor."),
)
_COLLECTIONS = (list, tuple, set, frozenset)
_STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8", "QInt8Storage": "int8",
    "QUInt8Storage": "uint8", "QInt32Storage": "int32", "QUInt4x2Storage": "uint8",
    "QUInt2x4Storage": "uint8",
}  # fmt: skip


def resolve(module: str, name: str) -> object:
    """Return what ``module.name`` stands for: a np.dtype for torch dtypes, else a Global."""
    full = f"{module}.{name}"
    for old, new in _ALIASES:
        if full.startswith(old):
            full = new + full.removeprefix(old)
            break
    if module in ("torch", "ml_dtypes") and (dtype := _torch_dtype(name)) is not None:
        return dtype
    return Global(full, _TABLE.get(full))


def storage_dtype(cls: object) -> np.dtype | None:
    """Return the element type of a torch storage class (``torch.FloatStorage``), or None."""
    if type(cls) is not Global:
        return None
    parent, _, name = cls.name.rpartition(".")
    if parent not in ("torch", "torch.storage", "torch.cuda") or name not in _STORAGE_DTYPES:
        return None
    return _torch_dtype(_STORAGE_DTYPES[name])


def _torch_dtype(name: str) -> np.dtype | None:
    if name in ("complex128", "cdouble"):
        return np.dtype(np.complex128)
    try:
        return dtypes.from_torch(name)
    except UnsupportedError:
        return None


# -- builtins -------------------------------------------------------------------------------------


def _elements(guard: Guard, args: Args) -> Any:
    """Return the only argument, a builtin collection, after charging for its copy."""
    if not args:
        return ()
    if len(args) != 1 or type(args[0]) not in _COLLECTIONS:
        guard.fail(f"a collection is made of {brief(args[0])}")
    guard.spend(len(args[0]))
    return args[0]


def _collection(kind: Callable[[Any], object]) -> Build:
    def build(guard: Guard, args: Args) -> object:
        elements = _elements(guard, args)
        if kind is set or kind is frozenset:
            guard.check_keys(elements, elements)
        return kind(elements)

    return build


def _dict(guard: Guard, args: Args) -> object:
    """dict, OrderedDict, Counter: a dict or a collection of pairs."""
    if not args or args == (None,):
        return {}
    if type(args[0]) is dict and len(args) == 1:
        guard.spend(len(args[0]))
        return dict(args[0])
    pairs = _elements(guard, args)
    for pair in pairs:
        if type(pair) not in (tuple, list) or len(pair) != 2:
            guard.fail("a dictionary is made of something that is not pairs")
    guard.check_keys([pair[0] for pair in pairs], pairs)
    return dict(pairs)


def _defaultdict(guard: Guard, args: Args) -> object:
    return _dict(guard, args[1:])  # the factory is never called, so it is dropped


def _plain(*kinds: type) -> Build:
    """The first type, applied to values of exactly these types only."""

    def build(guard: Guard, args: Args) -> object:
        if len(args) > 1 or any(type(a) not in kinds for a in args):
            guard.fail(f"a {kinds[0].__name__} is made of {brief(args[0])}")
        return kinds[0](*args)

    return build


def _complex(guard: Guard, args: Args) -> object:
    if len(args) > 2 or any(type(a) not in (int, float) for a in args):
        guard.fail("a complex number is not made of numbers")
    return complex(*args)


def _slice(guard: Guard, args: Args) -> object:
    if not 1 <= len(args) <= 3 or any(type(a) not in (int, type(None)) for a in args):
        return Record("builtins.slice", args)
    return slice(*args)


def _bytes(kind: type) -> Build:
    def build(guard: Guard, args: Args) -> object:
        if len(args) == 2 and type(args[0]) is str and args[1] in ("latin-1", "latin1"):
            return kind(latin1(guard, args))
        if not args:
            return kind()
        if len(args) != 1 or type(args[0]) not in (bytes, bytearray, list, tuple):
            guard.fail(f"bytes are made of {brief(args[0])}")
        guard.spend(len(args[0]))
        return kind(args[0])

    return build


def _getattr(guard: Guard, args: Args) -> object:
    """Nested classes and enum members by name; a field of a Record. Never the real getattr."""
    if len(args) == 2 and type(args[1]) is str:
        owner, name = args
        if type(owner) is Global:
            if len(owner.name) + len(name) > 1_000:
                guard.fail("a class name is absurdly long")
            return Global(f"{owner.name}.{name}")
        if type(owner) is Record and name in owner.fields:
            return owner.fields[name]
    return Record("builtins.getattr", args)


def _reconstructor(guard: Guard, args: Args) -> object:
    """``copyreg._reconstructor(cls, base, state)``: objects of protocols 0 and 1."""
    if not args or type(args[0]) is not Global:
        guard.fail("an object without a class")
    return Record(args[0].name, args[2:] if args[2:] != (None,) else ())


def _newobj(guard: Guard, args: Args) -> object:
    if not args or type(args[0]) is not Global:
        guard.fail("an object without a class")
    build = args[0].build
    return Record(args[0].name, args[1:]) if build is None else build(guard, args[1:])


def _path(kind: type[PurePosixPath] | type[PureWindowsPath]) -> Build:
    def build(guard: Guard, args: Args) -> object:
        if any(type(a) is not str for a in args):
            guard.fail("a path is made of something that is not text")
        guard.spend(sum(map(len, args)))
        return str(kind(*args))

    return build


# -- torch ----------------------------------------------------------------------------------------


def _tensor(guard: Guard, args: Args) -> object:
    """``_rebuild_tensor(storage, offset, size, stride)`` and _v2 with more arguments."""
    if len(args) < 4 or type(args[0]) is not Storage:
        guard.fail("a tensor has no storage")
    if len(args) > 6 and args[6]:  # {"conj": True} or {"neg": True}
        return Record("torch._utils._rebuild_tensor_v2", args)
    return make_tensor(args[0], args[0].dtype, args[1], args[2], args[3])


def _tensor_v3(guard: Guard, args: Args) -> object:
    """As v2, with the element type given apart from an untyped storage."""
    if len(args) < 7 or type(args[0]) is not Storage:
        guard.fail("a tensor has no storage")
    if not isinstance(args[6], np.dtype) or (len(args) > 7 and args[7]):
        return Record("torch._utils._rebuild_tensor_v3", args)
    return make_tensor(args[0], args[6], args[1], args[2], args[3])


def _parameter(guard: Guard, args: Args) -> object:
    """A parameter is its data: a StoredTensor, or the Record of a DTensor."""
    if not args or type(args[0]) not in (StoredTensor, Record):
        guard.fail("a parameter has no data")
    return args[0]


def _from_type(guard: Guard, args: Args) -> object:
    """``_rebuild_from_type_v2(function, class, args, state)``: DTensor and tensor subclasses."""
    if len(args) != 4 or type(args[1]) is not Global or type(args[2]) is not tuple:
        guard.fail("a tensor subclass has no class")
    function, cls, inner, state = args
    build = function.build if type(function) is Global else None
    made = build(guard, inner) if build else None
    if type(made) is StoredTensor and cls.name in _TENSOR_CLASSES:
        return made
    record = Record(cls.name, (made,) if type(made) is StoredTensor else inner)
    if (
        type(state) is tuple
        and len(state) == 2
        and all(type(s) in (dict, type(None)) for s in state)
    ):
        guard.spend(sum(len(s) for s in state if s))
        state = {**(state[0] or {}), **(state[1] or {})}
    record.state = state
    return record


def _device(guard: Guard, args: Args) -> object:
    if not 1 <= len(args) <= 2 or type(args[0]) is not str or type(args[-1]) not in (str, int):
        return Record("torch.device", args)
    return args[0] if len(args) == 1 else f"{args[0][:80]}:{brief(args[1])}"


def _first_text(guard: Guard, args: Args) -> object:
    return args[0] if args and type(args[0]) is str else Record("torch.layout", args)


_TENSOR_CLASSES = (
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.Parameter",
    "torch.nn.parameter.Buffer",
)
_TABLE: dict[str, Build] = {
    "builtins.list": _collection(list),
    "builtins.tuple": _collection(tuple),
    "builtins.set": _collection(set),
    "builtins.frozenset": _collection(frozenset),
    "builtins.dict": _dict,
    "builtins.int": _plain(int, float, bool),
    "builtins.float": _plain(float, int, bool),
    "builtins.bool": _plain(bool, int),
    "builtins.str": _plain(str),
    "builtins.complex": _complex,
    "builtins.slice": _slice,
    "builtins.bytes": _bytes(bytes),
    "builtins.bytearray": _bytes(bytearray),
    "builtins.getattr": _getattr,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _defaultdict,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _newobj,
    "_codecs.encode": latin1,
    **{
        f"pathlib.{n}": _path(PurePosixPath)
        for n in ("Path", "PosixPath", "PurePath", "PurePosixPath")
    },
    **{f"pathlib.{n}": _path(PureWindowsPath) for n in ("WindowsPath", "PureWindowsPath")},
    "numpy.dtype": np_dtype,
    "numpy.core.multiarray._reconstruct": np_reconstruct,
    "numpy.core.multiarray.scalar": np_scalar,
    "numpy.core.numeric._frombuffer": np_frombuffer,
    "torch.Size": _collection(tuple),
    "torch.device": _device,
    "torch.serialization._get_layout": _first_text,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._tensor._rebuild_from_type": _from_type,
}
