"""Keys of Megatron's distributed checkpoints, taken apart into one tensor per layer and expert.

Homogeneous layers are one key without layer number and a leading layer dim, experts of a layer one
key (``experts.experts``) with an expert dim; heterogeneous models number the layers in the keys
(``megatron/core/transformer/transformer_block.py``, ``moe/experts.py``). ``weight_w`` and
``weight_v`` are gate and up of one fc1; Mamba's projections are saved in their named parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...errors import FormatError, LayoutError
from ..tensor import LazyTensor, concat
from .names import canonical

_STACKED = re.compile(r"^((?:decoder|encoder)\.layers)\.(?!\d)(.*)$")
_EXPERTS = re.compile(r"^(.*\.mlp\.experts)\.experts\.(?:(\d+)\.)?(.*)$")
_PART = re.compile(
    r"^(.*\.(?:linear_fc1|in_proj|conv1d)\.(?:weight|bias))(?:_(w|v)|\.(z|x|B|C|dt))$"
)
_ORDERS = (("w", "v"), ("z", "x", "B", "C", "dt"), ("x", "B", "C"))


def unstack(tensors: Mapping[str, LazyTensor], layers: int | None) -> dict[str, LazyTensor]:
    """Return the tensors under canonical names, one per layer and expert, in model order.

    Args:
        tensors: by saved key.
        layers: ``args.num_layers``, where known.

    Raises:
        LayoutError: stacks of different depths, or of another depth than ``layers``.
        FormatError: two keys for one tensor, parts that are missing.
    """
    out: dict[str, LazyTensor] = {}
    depth = layers
    for key, tensor in tensors.items():
        name = canonical(key)
        stacked = _STACKED.match(name)
        if stacked:
            if not tensor.ndim or (depth is not None and tensor.shape[0] != depth):
                raise LayoutError(f"{key}: has shape {tensor.shape}, expected {depth} layers in it")
            depth = tensor.shape[0]
            split = [(f"{stacked[1]}.{i}.{stacked[2]}", t) for i, t in _unbind(tensor)]
        else:
            split = [(name, tensor)]
        for full, piece in split:
            for own, one in _experts_of(key, full, piece):
                spelled = canonical(own)
                if spelled in out:
                    raise FormatError(f"{key}: {spelled} is in another key, too")
                out[spelled] = one
    joined = _join_parts(out)
    return {name: joined[name] for name in sorted(joined, key=_model_order)}


def _unbind(tensor: LazyTensor) -> Iterator[tuple[int, LazyTensor]]:
    for i in range(tensor.shape[0]):
        yield i, tensor.slice([slice(i, i + 1)]).reshape(tensor.shape[1:])


def _experts_of(key: str, name: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    m = _EXPERTS.match(name)
    if m is None:
        yield name, tensor
    elif m[2] is not None:
        yield f"{m[1]}.local_experts.{m[2]}.{m[3]}", tensor
    elif tensor.ndim < 2:
        raise LayoutError(f"{key}: has shape {tensor.shape}, expected a dim of experts")
    else:
        for e, one in _unbind(tensor):
            yield f"{m[1]}.local_experts.{e}.{m[3]}", one


def _join_parts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Join gate and up, and the parts of Mamba projections, along their rows."""
    out: dict[str, LazyTensor] = {}
    parts: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        m = _PART.match(name)
        if m:
            parts.setdefault(m[1], {})[m[2] or m[3]] = tensor
        else:
            out[name] = tensor
    for name, found in parts.items():
        order = next((o for o in _ORDERS if set(o) == set(found)), None)
        if order is None or name in out:
            raise FormatError(
                f"{name}: saved in parts {', '.join(sorted(found))}, some are missing"
            )
        out[name] = concat([found[p] for p in order])
    return out


def _model_order(name: str) -> tuple[object, ...]:
    """Embedding, layers by number (experts by number), the rest."""
    first = 0 if name.startswith("embedding.") else 1 if ".layers." in name else 2
    words = name.split(".")
    return (first, [(int(w), "") if w.isdigit() else (-1, w) for w in words])
