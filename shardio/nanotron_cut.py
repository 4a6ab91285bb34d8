"""How nanotron spreads a Llama or Qwen2 model: cuts over tensor-parallel ranks, blocks over stages.

``model/<module path>/model_<param>_pp-rank-P-of-N_tp-rank-T-of-N.safetensors`` for what is cut (by
one rank, too), plain ``model_<param>.safetensors`` for norms. Blocks go to stages by their
share of the computation. Source: nanotron ``nn/layer_norm.py``, ``parallel/tensor_parallel/nn.py``,
``models/{base,llama,qwen}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..errors import LayoutError, UnsupportedError
from .box import Index
from .checkpoint import Tensors
from .layout import Layout, demand
from .placement import Fused, Placement, Shard
from .tensor import LazyTensor

EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
HEAD = "model.lm_head.pp_block.weight"
_LAYER = re.compile(r"^model\.decoder\.(\d+)\.pp_block\.(.+)$")
_ORDER = (  # of the modules of a layer
    "input_layernorm.weight", "attn.qkv_proj.weight", "attn.qkv_proj.bias", "attn.o_proj.weight",
    "post_attention_layernorm.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight",
)  # fmt: skip
_VERSION = "1.5"
_ALL = "None,None,None"


@dataclass(frozen=True, slots=True)
class Grid:
    """A model on tp x pp ranks.

    Attributes:
        tp, pp: sizes.
        stages: stage of each weight.
        cuts: how weights are cut; absent for those that every rank holds.
        tied: the head is the embedding.
    """

    tp: int
    pp: int
    stages: Mapping[str, int]
    cuts: Mapping[str, Placement]
    tied: bool

    def held(self, stage: int) -> list[str]:
        """Weights that the optimizer of a stage has, in the order of the model."""
        names = [n for n, s in self.stages.items() if s == stage]
        if self.tied and stage == self._last() != self.stages[EMBEDDING]:
            names.append(EMBEDDING)  # the head's stage has a copy of its own
        return names

    def cut(self, name: str, tensor: LazyTensor, rank: int) -> LazyTensor:
        """What a tensor-parallel rank holds of a weight or of one of its states."""
        cut = self.cuts.get(name)
        return tensor if cut is None else cut.cut(tensor, rank, self.tp)

    def file(self, name: str, rank: int) -> str:
        """The path of a weight's file."""
        *folders, param = name.split(".")
        mark = f"_pp-rank-{self.stages[name]}-of-{self.pp}_tp-rank-{rank}-of-{self.tp}"
        mark = mark if name in self.cuts else ""
        return "/".join(["model", *folders, f"model_{param}{mark}.safetensors"])

    def metadata(self, name: str, shape: Index, rank: int) -> dict[str, str]:
        """What a file says of its place in the whole tensor."""
        cut = self.cuts.get(name)
        if cut is None:
            return {}
        return {
            "version": _VERSION,
            "unsharded_shape": str(tuple(shape)),
            "local_global_slices_pairs": ";".join(_pairs(cut, shape, rank, self.tp)),
        }

    def _last(self) -> int:
        return max(self.stages.values())


def divide(weights: Tensors, args: Mapping[str, Any], layout: Layout, tied: bool) -> Grid:
    """Return the grid of a model with nanotron's names.

    Args:
        weights: by nanotron's names.
        args: ``model_config.json``.
        layout: tp and pp; ``pp_layers`` where the run deals its layers otherwise than nanotron.
        tied: the head is the embedding.

    Raises:
        LayoutError: sizes that do not divide the model, with the nearest that do.
        UnsupportedError: tensors that nanotron's models do not have.
    """
    heads, groups = int(args["num_attention_heads"]), int(args["num_key_value_heads"])
    width = int(args["intermediate_size"])
    cuts = {n: c for n in weights if (c := _placement(n, weights[n].shape, heads, groups))}
    limits = {"attention heads": heads, "key/value heads": groups, "columns of the MLP": width}

    def problem(size: int) -> str | None:
        bad = next((f"{n} {what}" for what, n in limits.items() if n % size), None)
        return None if bad is None else f"{bad} cannot be divided over {size} ranks"

    demand("tp", layout.tp, min(limits.values()), problem)
    stages = _given(weights, layout) if layout.pp_layers else _stages(weights, args, layout.pp)
    placed = {n: stages[_block(n)] for n in _sorted(weights)}
    return Grid(layout.tp, layout.pp, placed, cuts, tied)


def _placement(name: str, shape: Index, heads: int, groups: int) -> Placement | None:
    kind = m[2] if (m := _LAYER.match(name)) else name
    if kind.startswith("attn.qkv_proj."):
        unit = shape[0] // (heads + 2 * groups)
        return Fused(0, (heads * unit, groups * unit, groups * unit))
    if kind == "mlp.gate_up_proj.weight":
        return Fused(0, (shape[0] // 2, shape[0] // 2))
    if kind in ("attn.o_proj.weight", "mlp.down_proj.weight"):
        return Shard(1, even=True)
    if name in (EMBEDDING, HEAD):
        return Shard(0, even=True)
    if kind.endswith("norm.weight") or name == "model.final_layer_norm.pp_block.weight":
        return None
    raise UnsupportedError(f"{name}: nanotron's Llama and Qwen2 models have no such parameter")


def _pairs(cut: Placement, shape: Index, rank: int, world: int) -> list[str]:
    """Slices of a rank's part, and where they belong in the whole."""
    if isinstance(cut, Shard):
        size = shape[cut.dim] // world
        whole = [_ALL] * len(shape)
        place = [*whole]
        place[cut.dim] = f"{rank * size},{(rank + 1) * size},None"
        return [f"{'|'.join(whole)}#{'|'.join(place)}"]
    assert isinstance(cut, Fused), "a cut is one or the other"
    found, local, start = [], 0, 0
    rest = [_ALL] * (len(shape) - 1)
    for width in cut.widths:
        size = width // world
        left = "|".join([f"{local},{local + size},None", *rest])
        first = start + rank * size
        found.append(f"{left}#{'|'.join([f'{first},{first + size},None', *rest])}")
        local, start = local + size, start + width
    return found


# -- order and stages -----------------------------------------------------------------------------


def _block(name: str) -> str:
    """The pipeline block a weight is in: ``decoder.0``, ``lm_head``..."""
    return name.removeprefix("model.").partition(".pp_block")[0]


def _blocks(layers: int) -> list[str]:
    names = ["token_position_embeddings", *(f"decoder.{i}" for i in range(layers))]
    return [*names, "final_layer_norm", "lm_head", "cast_to_fp32", "loss"]


def _layers(weights: Tensors) -> int:
    return 1 + max((int(m[1]) for n in weights if (m := _LAYER.match(n))), default=-1)


def _sorted(weights: Tensors) -> list[str]:
    """Names in the order of the model's modules."""
    place = {name: k for k, name in enumerate(_blocks(_layers(weights)))}

    def key(name: str) -> tuple[int, int]:
        inner = m[2] if (m := _LAYER.match(name)) else ""
        return place[_block(name)], _ORDER.index(inner) if inner in _ORDER else 0

    return sorted(weights, key=key)


def _given(weights: Tensors, layout: Layout) -> dict[str, int]:
    """Stages with the wanted numbers of layers."""
    counts, layers = layout.pp_layers or (), _layers(weights)
    if len(counts) != layout.pp or sum(counts) != layers:
        raise LayoutError(
            f"pp_layers={'+'.join(map(str, counts))}: {layers} layers on {layout.pp} stages need "
            f"{layout.pp} numbers that sum to {layers}"
        )
    first, *inner, norm, head, cast, loss = _blocks(layers)
    found = {first: 0} | dict.fromkeys((norm, head, cast, loss), layout.pp - 1)
    dealt = [stage for stage, n in enumerate(counts) for _ in range(n)]
    return found | dict(zip(inner, dealt, strict=True))


def _stages(weights: Tensors, args: Mapping[str, Any], pp: int) -> dict[str, int]:
    """Stage of each block: the next one begins after the block that passes the stage's share."""
    layers, hidden = _layers(weights), int(args["hidden_size"])
    per_head = hidden // int(args["num_attention_heads"])
    layer = 4 * int(args["num_attention_heads"]) * per_head * hidden
    layer += 3 * int(args["intermediate_size"]) * hidden
    costs = {f"decoder.{i}": layer for i in range(layers)}
    costs["lm_head"] = int(args["vocab_size"]) * hidden
    blocks = _blocks(layers)
    found = _dealt(blocks, [*accumulate(costs.get(b, 0) for b in blocks)], pp)
    if len(set(found.values())) < pp:
        fits = [n for n in range(1, layers + 3) if len(set(_dealt_counts(costs, blocks, n))) == n]
        near = sorted(fits, key=lambda n: abs(n - pp))[:2]
        raise LayoutError(
            f"pp={pp}: nanotron would leave a stage of {layers} layers without a block; nearest "
            f"valid: {' or '.join(f'pp={n}' for n in sorted(near))}"
        )
    return found


def _dealt_counts(costs: Mapping[str, int], blocks: Sequence[str], pp: int) -> list[int]:
    return [*_dealt(blocks, [*accumulate(costs.get(b, 0) for b in blocks)], pp).values()]


def _dealt(blocks: Sequence[str], sums: Sequence[int], pp: int) -> dict[str, int]:
    found, stage = {}, 0
    for block, held in zip(blocks, sums, strict=True):
        found[block] = min(stage, pp - 1)
        if held > sums[-1] * ((stage + 1) / pp):
            stage += 1
    return found
