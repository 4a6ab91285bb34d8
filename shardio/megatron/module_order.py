"""The order of ``named_parameters()`` in a Megatron GPT model, by layer spec.

The flat optimizer buffers follow it. Source: ``megatron/core/models/gpt/gpt_layer_specs.py``,
``transformer/{attention,multi_latent_attention}.py`` and ``transformer/moe``: a module's own
parameters come before those of its children, children in the order of their construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UnsupportedError
from ..box import Index
from .names import expert_of, layer_of

Named = list[tuple[str, Index]]

_OUTSIDE = ("embedding.word_embeddings", "embedding.position_embeddings", "embedding.tokentype")
_MLP = (
    "pre_mlp_layernorm", "mlp.router", "mlp.shared_experts", "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
_ATTENTION = (
    "linear_proj", "linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj",
    "linear_kv_down_proj", "linear_kv_up_proj", "q_layernorm", "k_layernorm", "kv_layernorm",
)  # fmt: skip
# Transformer Engine fuses the norms of latent attention into the up projections behind them
_LATENT = (
    "linear_proj", "linear_q_proj", "linear_q_down_proj", "q_layernorm", "linear_q_up_proj",
    "linear_kv_down_proj", "kv_layernorm", "linear_kv_up_proj",
)  # fmt: skip


def _layer(*names: str) -> tuple[str, ...]:
    inside = set(_ATTENTION)
    return (*(f"self_attention.{n}" if n in inside else n for n in names), *_MLP)


class Order(ABC):
    """One possible order."""

    __slots__ = ()
    cuts_latent: bool = True

    @abstractmethod
    def arrange(self, shapes: Mapping[str, Index], experts: int) -> Named | None:
        """Return (name, shape) as the buffers have them (last parameter first).

        Args:
            shapes: canonical name, with local expert numbers, to what a rank holds.
            experts: experts per expert rank.

        None when the order does not know a module.
        """


@dataclass(frozen=True, slots=True)
class Dense(Order):
    """Everything but routed experts.

    Attributes:
        modules: of a layer, in order.
        cuts_latent: MLA's down projections are cut by rows (copied otherwise).
    """

    modules: Sequence[str]
    cuts_latent: bool = True

    def arrange(self, shapes: Mapping[str, Index], experts: int) -> Named | None:
        """See ``Order``."""
        keys = {name: self._key(name) for name in shapes}
        if None in keys.values():
            return None
        ordered = sorted(shapes, key=lambda n: keys[n] or (), reverse=True)
        return [(n, shapes[n]) for n in ordered]

    def _key(self, name: str) -> tuple[int, ...] | None:
        bias = int(name.endswith(".bias"))
        module = name.rpartition(".")[0]
        layer = layer_of(name)
        if layer is not None:
            module = module.split(".", 3)[3]
            return (1, layer, self.modules.index(module), bias) if module in self.modules else None
        if module in _OUTSIDE:
            return 0, _OUTSIDE.index(module), 0, bias
        last = ("decoder.final_layernorm", "output_layer")
        return (2, last.index(module), 0, bias) if module in last else None


@dataclass(frozen=True, slots=True)
class Experts(Order):
    """Routed experts of the layers.

    Attributes:
        style: ``sequential`` (expert by expert), ``grouped`` (all fc1, then all fc2) or ``legacy``
            (GroupedMLP: two tensors for all experts).
    """

    style: str

    def arrange(self, shapes: Mapping[str, Index], experts: int) -> Named | None:
        """See ``Order``."""
        if self.style == "legacy":
            return self._legacy(shapes, experts)
        keys: dict[str, tuple[int, ...]] = {}
        for name in shapes:
            words = name.split(".")  # decoder.layers.I.mlp.experts.local_experts.E.linear_fcN.kind
            if len(words) != 9 or words[7] not in ("linear_fc1", "linear_fc2"):
                return None
            layer, expert, which = int(words[2]), int(words[6]), int(words[7][-1])
            bias = int(words[8] == "bias")
            if self.style == "sequential":
                keys[name] = (layer, expert, which, bias)
            else:
                keys[name] = (layer, which, bias, expert)
        return [(n, shapes[n]) for n in sorted(shapes, key=keys.__getitem__, reverse=True)]

    @staticmethod
    def _legacy(shapes: Mapping[str, Index], experts: int) -> Named | None:
        out: Named = []
        for name, shape in shapes.items():
            if len(shape) != 2:
                return None
            rows, columns = shape
            at, _, rest = name.partition(".local_experts.0.")
            if rest == "linear_fc1.weight":
                out.append((f"{at}.weight1", (columns, experts * rows)))
            elif rest == "linear_fc2.weight":
                out.append((f"{at}.weight2", (experts * columns, rows)))
        return sorted(out, key=lambda x: (layer_of(x[0]) or 0, x[0]), reverse=True)


_LOCAL = Dense(_layer("input_layernorm", *_ATTENTION))
_FUSED = Dense(_layer("linear_proj", "input_layernorm", *_ATTENTION[1:]), cuts_latent=False)
_FUSED_LATENT = Dense(_layer("input_layernorm", *_LATENT), cuts_latent=False)


def dense_orders(args: Mapping[str, object]) -> tuple[Order, ...]:
    """Orders of dense parameters, the most likely one first."""
    if args.get("transformer_impl") == "local":
        return _LOCAL, _FUSED, _FUSED_LATENT
    if args.get("multi_latent_attention"):
        return _FUSED_LATENT, _LOCAL
    return _FUSED, _LOCAL


def expert_orders(args: Mapping[str, object]) -> tuple[Order, ...]:
    """Orders of expert parameters, the most likely one first."""
    sequential, grouped, legacy = (Experts(s) for s in ("sequential", "grouped", "legacy"))
    if args.get("moe_grouped_gemm"):
        return grouped, legacy, sequential
    return sequential, grouped, legacy


_KINDS = ("weight", "gate_weight", "bias", "expert_bias")


def state_order(args: Mapping[str, object], *, grouped: bool) -> Callable[[str], tuple[Any, ...]]:
    """Return the sort key that brings canonical names into the order of ``state_dict()``.

    Args:
        args: settings, for the layer spec (``transformer_impl``).
        grouped: a layer's experts are in one module per projection, not one after the other.

    The key raises UnsupportedError for a module whose place is not known.
    """
    order = dense_orders(args)[0]
    assert isinstance(order, Dense), "dense parameters come in a dense order"
    modules = {m: k for k, m in enumerate(order.modules)}
    experts = modules["mlp.router"] + 0.5  # between router and shared experts

    def key(name: str) -> tuple[Any, ...]:
        module, _, last = name.rpartition(".")
        kind = _KINDS.index(last) if last in _KINDS else None
        layer = layer_of(name)
        own = None if layer is None else module.split(".", 3)[3]
        expert = expert_of(name)
        if kind is not None and expert is not None and layer is not None:
            which = module.rpartition(".")[2]
            inner = (which, kind, expert) if grouped else (expert, which, kind)
            return (1, layer, experts, inner)
        if kind is not None and own in modules:
            return (1, layer, modules[own], (kind,))
        for k, outside in ((0, _OUTSIDE), (2, ("decoder.final_layernorm", "output_layer"))):
            if kind is not None and module in outside:
                return (k, outside.index(module), 0, (kind,))
        raise UnsupportedError(f"{name}: its place in a Megatron GPT model is not known")

    return key
