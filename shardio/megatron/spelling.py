"""Canonical tensor names as Megatron's modules and distributed checkpoints spell them.

The inverse of ``names`` and ``stacked``. ``local`` modules have the canonical names, Transformer
Engine fuses norms into the linear behind them (``megatron/core/models/gpt/gpt_layer_specs.py``);
distributed checkpoints use the latter names for both, except with latent attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..box import Index
from ..tensor import LazyTensor, concat
from .names import expert_of

_EXPERT = re.compile(r"^(.*\.mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.(\w+)$")
_LAYER = re.compile(r"^(decoder\.layers)\.(\d+)\.(.*)$")
_LINEAR = re.compile(r"^(.*\.linear_\w+)\.weight(\d*)$")
_NORM = re.compile(r"^(.*norm)\.weight$")
EXTRA = "_extra_state"


@dataclass(frozen=True, slots=True)
class Spelling:
    """Which modules the model is made of.

    Attributes:
        engine: Transformer Engine's modules, else local ones.
        latent: multi-latent attention.
        grouped: a layer's experts are one module (``moe_grouped_gemm``).
        moe: layers that have experts.
        layers: number of layers.
        stacked: distributed checkpoints hold all layers in one tensor.
    """

    engine: bool
    latent: bool
    grouped: bool
    moe: frozenset[int]
    layers: int
    stacked: bool

    def module(self, name: str, layer: int | None) -> str:
        """Name in a rank's state dict; ``layer`` is its global layer number."""
        if not self.engine:
            return name
        if self.grouped and (m := _EXPERT.match(name)):
            return f"{m[1]}.{m[3]}.{m[4]}{m[2]}"
        return self._fused(name, moe=layer in self.moe)

    def key(self, name: str, experts: int) -> tuple[str, Index, Index]:
        """Key in a distributed checkpoint, and where the tensor lies in its leading dims.

        Args:
            name: canonical.
            experts: of a layer.

        Returns:
            (key, index in each leading dim, sizes of these dims).
        """
        at: list[int] = []
        sizes: list[int] = []
        layer = _LAYER.match(name)
        if self.engine or not self.latent:
            # local modules of mixture-of-experts layers rename this norm, too
            moe = self.engine and layer is not None and int(layer[2]) in self.moe
            name = self._fused(name, moe=moe)
        if self.stacked and (layer := _LAYER.match(name)):
            at.append(int(layer[2]))
            sizes.append(self.layers)
            name = f"{layer[1]}.{layer[3]}"
        if m := _EXPERT.match(name):
            at.append(int(m[2]))
            sizes.append(experts)
            name = f"{m[1]}.experts.{m[3]}.{m[4]}"
        return name, tuple(at), tuple(sizes)

    def _fused(self, name: str, *, moe: bool) -> str:
        if self.latent:
            for x in ("q", "kv"):
                norm, linear = f".{x}_layernorm.", f".linear_{x}_up_proj.layer_norm_"
                name = name.replace(norm, linear)
        else:
            name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        if not moe:
            name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        return name

    def extra(self, saved: str) -> Iterator[str]:
        """Names of the extra states that belong to the module of a saved weight."""
        if m := _LINEAR.match(saved):
            yield f"{m[1]}.{EXTRA}"
            if self.engine and m[1].endswith(".linear_proj"):
                yield f"{m[1].removesuffix('linear_proj')}core_attention.{EXTRA}"
        elif saved == "output_layer.weight":
            yield f"output_layer.{EXTRA}"
        elif self.engine and (m := _NORM.match(saved)):
            yield f"{m[1]}.{EXTRA}"


def group_experts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Join a rank's experts into the two tensors of ``GroupedMLP`` (``weight1``, ``weight2``).

    weight1 is declared (hidden, experts * rows) and weight2 (experts * columns, hidden), but both
    lie in memory as (experts, in, out): transposed linears one after the other.
    """
    out: dict[str, LazyTensor] = {}
    found: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        m = _EXPERT.match(name)
        if m is None:
            out[name] = tensor
            continue
        joined = f"{m[1]}.weight{m[3][-1]}"
        out[joined] = tensor  # keeps its place
        found.setdefault(joined, {})[expert_of(name) or 0] = tensor
    for name, experts in found.items():
        rows = concat([experts[e].permute((1, 0)) for e in sorted(experts)])  # (experts * in, out)
        hidden = rows.shape[0] // len(experts)
        out[name] = rows.reshape((hidden, -1)) if name.endswith("weight1") else rows
    return out
