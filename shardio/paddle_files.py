"""The files that ``paddle.save`` writes: names, tensors and optimizer states of one of them.

A state dict is a pickle of numpy arrays by structured name, with a table
``StructuredToParameterName@@`` to the parameters' own names, which the optimizer's states are
called after (``linear_0.w_0_moment1_0``). Nested saves have ``(parameter name, array)`` pairs
instead. bfloat16 lies as uint16, which Paddle has no use for otherwise. Arrays over 1 GB of
pickle protocol 2 are cut in pieces. Source: Paddle ``python/paddle/framework/io.py`` and
``optimizer/optimizer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import FormatError
from .chunked import Chunked
from .pickle_file import open_pickle
from .records import StoredTensor
from .stored import lazy
from .tensor import LazyTensor, concat, from_array

NAMES = "StructuredToParameterName@@"
_PIECES = "UnpackBigParamInfor@@"
_STATE = re.compile(r"^(?P<owner>.+?)(?:_fp32_master_\d+)?[_/](?P<kind>[a-z]\w*?)_\d+$")
_KINDS = {"moment1": "exp_avg", "moment2": "exp_avg_sq", "velocity": "momentum_buffer"}
_COUNTERS = ("beta1_pow_acc", "beta2_pow_acc")
_MASTERS = "master_weights"
_MAX_DEPTH = 8
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(slots=True)
class PaddleFile:
    """What one file holds.

    Attributes:
        path: the file.
        tensors: by the dict keys that lead to them.
        parameters: structured name to the parameter's own name, as far as the file tells.
        rest: everything else at the top level, as it came from the pickle.
    """

    path: Path
    tensors: dict[tuple[str, ...], LazyTensor] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)

    def below(self, *keys: str) -> dict[str, LazyTensor]:
        """Return the tensors directly below a path of dict keys."""
        n = len(keys)
        return {k[n]: t for k, t in self.tensors.items() if len(k) == n + 1 and k[:n] == keys}


def read_paddle(path: Path) -> PaddleFile:
    """Read the structure of one file; large arrays stay in it.

    Raises:
        FormatError: damaged file, no dict, pieces that do not fit.
    """
    root = open_pickle(path)
    if not isinstance(root, dict):
        raise FormatError(f"{path}: holds no state dict but a {type(root).__name__}")
    found = PaddleFile(path)
    pieces = root.pop(_PIECES, {})
    _collect(found, root, ())
    if isinstance(pieces, dict):
        _join_pieces(found, pieces)
    return found


def _collect(found: PaddleFile, node: Mapping[object, object], at: tuple[str, ...]) -> None:
    table = node.get(NAMES)
    if isinstance(table, dict):
        found.parameters.update((str(k), str(v)) for k, v in table.items())
    for key, value in node.items():
        name = (*at, str(key))
        own, array = _pair(value)
        if array is not None:
            found.tensors[name] = _tensor(array)
            if own:
                found.parameters.setdefault(name[-1], own)
        elif isinstance(value, dict) and key != NAMES and len(name) < _MAX_DEPTH:
            _collect(found, value, name)
        elif not at and key != NAMES:
            found.rest[str(key)] = value


def _pair(value: object) -> tuple[str, np.ndarray | StoredTensor | None]:
    """Return (parameter name, array) of the two ways in which tensors are pickled."""
    if isinstance(value, (np.ndarray, StoredTensor)):
        return "", value
    if (
        type(value) is tuple
        and len(value) == 2
        and isinstance(value[1], (np.ndarray, StoredTensor))
    ):
        return str(value[0]), value[1]
    return "", None


def _tensor(array: np.ndarray | StoredTensor) -> LazyTensor:
    return true_dtype(lazy(array) if isinstance(array, StoredTensor) else from_array(array))


def true_dtype(tensor: LazyTensor) -> LazyTensor:
    """Return a tensor of uint16 as the bfloat16 that it holds, others as they are."""
    if tensor.dtype == np.uint16 and isinstance(tensor, Chunked):
        return Chunked(tensor.shape, _BFLOAT16, tensor.chunks)
    return tensor


def _join_pieces(found: PaddleFile, pieces: Mapping[object, object]) -> None:
    for name, info in pieces.items():
        slices = info.get("slices") if isinstance(info, dict) else None
        shape = info.get("OriginShape") if isinstance(info, dict) else None
        parts = [found.tensors.pop((str(s),), None) for s in slices or ()]
        whole = [p for p in parts if p is not None]
        if not whole or len(whole) < len(parts) or not isinstance(shape, tuple):
            raise FormatError(f"{found.path}: pieces of {name!r} are missing")
        flat = concat(whole)
        try:
            found.tensors[str(name),] = flat.reshape(shape)
        except ValueError as e:
            raise FormatError(f"{found.path}: the pieces of {name!r} do not fit: {e}") from e


def optimizer_states(
    tensors: Mapping[tuple[str, ...], LazyTensor], owner_of: Callable[[str], str | None]
) -> Iterator[tuple[str, str, LazyTensor]]:
    """Yield (state, weight, tensor) for the entries of an optimizer file.

    Args:
        tensors: of the file.
        owner_of: the weight's name for a parameter's own or structured name, None if unknown.
    """
    for keys, tensor in tensors.items():
        if len(keys) > 1 and keys[-2] == _MASTERS:
            owner = owner_of(keys[-1])
            kind = "master"
        else:
            hit = _STATE.match(keys[-1])
            if hit is None or hit["kind"] in _COUNTERS:
                continue
            owner, kind = owner_of(hit["owner"]), _KINDS.get(hit["kind"], hit["kind"])
        if owner is not None:
            yield kind, owner, tensor
