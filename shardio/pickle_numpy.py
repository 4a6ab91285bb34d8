"""Numpy's part of the table of harmless constructors: dtypes, scalars, arrays.

After numpy's ``_reconstruct``, ``__setstate__``, ``scalar`` and ``_frombuffer``. An array's bytes
come inline, or as a ``Storage`` where the reader leaves large ones in the file.
"""

from __future__ import annotations

import math
import re
from typing import Any

import ml_dtypes
import numpy as np

from .pickle_guard import Guard
from .records import Record, Storage, StoredTensor, make_tensor

Args = tuple[Any, ...]

_DTYPE_CODE = re.compile(r"[|<>=]?([iu][1248]|f[248]|c8|c16|b1|\?|[SV][1-9]\d{0,5})")
_MAX_ARRAY_DIMS = 32


def latin1(guard: Guard, args: Args) -> object:
    """``_codecs.encode``, how protocol 2 writes bytes."""
    if not args or type(args[0]) is not str:
        guard.fail("an encoding is applied to something that is not text")
    if args[1:] not in (("latin1",), ("latin-1",)):
        return Record("_codecs.encode", args)
    guard.spend(len(args[0]))
    return args[0].encode("latin-1")


def np_dtype(guard: Guard, args: Args) -> object:
    """``numpy.dtype('f4', False, True)``; structured and date types stay Records."""
    code = args[0] if args else None
    if isinstance(code, np.dtype):
        return code
    if type(code) is str:
        if _DTYPE_CODE.fullmatch(code):
            return np.dtype(code)
        if code in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            return np.dtype(getattr(ml_dtypes, code))
    return Record("numpy.dtype", args)


def np_reconstruct(guard: Guard, args: Args) -> object:
    return Record("numpy.ndarray", ())


def np_scalar(guard: Guard, args: Args) -> object:
    if len(args) != 2 or not isinstance(args[0], np.dtype) or type(args[1]) not in (bytes, str):
        return Record("numpy.scalar", args)
    raw = args[1] if type(args[1]) is bytes else latin1(guard, (args[1], "latin1"))
    return _array(guard, raw, args[0], (), False)[()]


def np_frombuffer(guard: Guard, args: Args) -> object:
    if len(args) != 4 or not isinstance(args[1], np.dtype):
        return Record("numpy.ndarray", args)
    return _array(guard, args[0], args[1], args[2], args[3] == "F")


def _array(guard: Guard, raw: Any, dtype: np.dtype, shape: Any, fortran: bool) -> Any:
    if type(shape) is not tuple or len(shape) > _MAX_ARRAY_DIMS:
        guard.fail("an array has no usable shape")
    if any(type(n) is not int or n < 0 for n in shape):
        guard.fail("an array has no usable shape")
    if type(raw) is Storage:
        return _stored_array(guard, raw, dtype, shape, fortran)
    if type(raw) not in (bytes, bytearray):
        guard.fail("an array has no bytes")
    if math.prod(shape) * dtype.itemsize != len(raw) or not dtype.itemsize:
        guard.fail(f"an array of {dtype} needs other than its {len(raw)} bytes")
    guard.spend(len(raw))
    flat = np.frombuffer(bytearray(raw), dtype) if raw else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _stored_array(
    guard: Guard, raw: Storage, dtype: np.dtype, shape: tuple[int, ...], fortran: bool
) -> StoredTensor:
    """An array whose bytes stay in the file."""
    if math.prod(shape) * dtype.itemsize != raw.nbytes or dtype.kind not in "biufcV":
        guard.fail(f"an array of {dtype} needs other than its {raw.nbytes} bytes")
    native = dtype.newbyteorder("=")
    big_endian = dtype.byteorder == ">"
    storage = Storage(raw.key, native, raw.nbytes, raw.offset, raw.path, big_endian)
    sizes = shape if fortran else shape[::-1]
    steps = [math.prod(sizes[:i]) for i in range(len(sizes))]
    return make_tensor(storage, native, 0, shape, tuple(steps if fortran else steps[::-1]))


def set_numpy_state(guard: Guard, target: Any, state: Any) -> Any:
    """Return what BUILD makes of an empty array or of a dtype.

    Array states are (version, shape, dtype, fortran, bytes); a dtype state's second entry is its
    byte order.
    """
    if isinstance(target, np.dtype):
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            guard.fail("a numpy dtype has no byte order")
        return target.newbyteorder(state[1])
    if target.name == "numpy.ndarray" and type(state) is tuple and len(state) == 5:
        _, shape, dtype, fortran, raw = state
        if isinstance(dtype, np.dtype):
            if type(raw) is str:  # written by Python 2
                raw = latin1(guard, (raw, "latin1"))
            return _array(guard, raw, dtype, shape, fortran is True or fortran == 1)
    target.state = state
    return target
