"""A whole model divided over Megatron's ranks: what each rank holds, under which name.

The inverse of ``merge``, by the same table of cuts. Tensors come in canonical names, whole and with
their true vocabulary; here the vocabulary is padded, every name gets its placement, and ``held``
answers what one rank has of a state (weights or moments alike).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

from ...errors import LayoutError
from ..box import Index
from ..checkpoint import Checkpoint, Tensors
from ..chunked import zeros
from ..layout import Layout
from ..placement import Placement
from ..tensor import LazyTensor, concat
from .cuts import cuts_of
from .fits import check_fits, experts_in
from .merge import EMBEDDING, HEAD
from .module_order import state_order
from .names import expert_of, is_expert, layer_of, shift_expert, shift_layer
from .settings import number
from .spelling import Spelling, group_experts
from .stages import Stages, stages_of_layout

DIVISIBLE = 128  # Megatron's default of --make-vocab-size-divisible-by
_VOCABULARY = (EMBEDDING, HEAD, "output_layer.bias")
ENGINE = "transformer_engine"


@dataclass(frozen=True, slots=True)
class Place:
    """A rank.

    Attributes:
        rank: within its stage.
        tp, ep, pp, etp: its ranks along the axes.
    """

    rank: int
    tp: int
    ep: int
    pp: int
    etp: int


@dataclass(frozen=True, slots=True)
class Division:
    """A model and how it is divided.

    Attributes:
        weights: canonical name to whole tensor, vocabulary padded, in the order of the model.
        args: settings of the model, of which the layer spec is settled.
        layout: parallel sizes.
        stages: the pipeline.
        cuts: name to placement over the tensor (or expert tensor) parallel ranks.
        spelling: names of the modules.
        experts: routed experts of a layer.
        tied: the head is the embedding.
        padded: rows of the vocabulary.
        held: (stage, chunk) to the names of what lies there.
    """

    weights: Tensors
    args: Mapping[str, Any]
    layout: Layout
    stages: Stages
    cuts: Mapping[str, Placement]
    spelling: Spelling
    experts: int
    tied: bool
    padded: int
    held: Mapping[tuple[int, int], list[str]]

    @property
    def etp(self) -> int:
        """Tensor parallel size of the experts."""
        return self.layout.etp or self.layout.tp

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage: enough for the dense axes and for the experts."""
        axes = self.layout
        return lcm(axes.tp * axes.cp * axes.dp, axes.ep * self.etp)

    def places(self) -> Iterator[Place]:
        """All ranks that hold something of their own, stage by stage (order tp-cp-ep-dp-pp)."""
        tp, ep = self.layout.tp, self.layout.ep
        for stage in range(self.stages.pp):
            for r in range(lcm(tp, ep * self.etp)):
                yield Place(r, r % tp, r // self.etp % ep, stage, r % self.etp)

    def chunk(self, place: Place, chunk: int, tensors: Tensors) -> dict[str, LazyTensor]:
        """What a rank's model chunk holds of a state: saved name to tensor, in saved order."""
        own = self.stages.layers()[place.pp, chunk]
        out: dict[str, LazyTensor] = {}
        for name in self._names_of(place, chunk):
            source = EMBEDDING if name == HEAD and self.tied else name
            if source not in tensors:
                continue
            world, rank = self.axis(name, place)
            local = shift_expert(name, -place.ep * self._local_experts)
            out[local] = self.cuts[source].cut(tensors[source], rank, world)
        if self.spelling.grouped and not self.spelling.engine:
            out = group_experts(out)
        saved = {self.spelling.module(n, layer_of(n)): t for n, t in out.items()}
        return {shift_layer(n, -own.start): t for n, t in saved.items()}

    def axis(self, name: str, place: Place) -> tuple[int, int]:
        """(ranks a tensor is cut over, number of this rank among them)."""
        if is_expert(name):
            return self.etp, place.etp
        return self.layout.tp, place.tp

    @property
    def _local_experts(self) -> int:
        return self.experts // self.layout.ep

    def _names_of(self, place: Place, chunk: int) -> Iterator[str]:
        """Canonical names with global numbers."""
        for name in self.held[place.pp, chunk]:
            expert = expert_of(name)
            if expert is None or expert // self._local_experts == place.ep:
                yield name


def _held(weights: Tensors, stages: Stages) -> dict[tuple[int, int], list[str]]:
    """(stage, chunk) to the names in it; the tied head has a copy on the last stage."""
    place_of = {i: place for place, own in stages.layers().items() for i in own}
    first, last = (0, 0), (stages.pp - 1, stages.vpp - 1)
    out: dict[tuple[int, int], list[str]] = {place: [] for place in stages.layers()}
    for name in weights:
        layer = layer_of(name)
        outside = first if name.startswith("embedding.") else last
        out[outside if layer is None else place_of[layer]].append(name)
    if HEAD not in weights and stages.pp > 1:
        out[last].append(HEAD)
    return out


def divide(ckpt: Checkpoint, layout: Layout) -> Division:
    """Divide a checkpoint with canonical names.

    Raises:
        LayoutError: sizes that do not divide the model, with the nearest valid ones.
        UnsupportedError: tensors that no rule covers.
    """
    args = dict(ckpt.args)
    args["transformer_impl"] = impl = (
        layout.transformer_impl or args.get("transformer_impl") or ENGINE
    )
    latent = any(".linear_kv_down_proj." in n for n in ckpt.weights)
    rows = latent and impl == "local"
    shapes = {n: t.shape for n, t in ckpt.weights.items()}
    layers = 1 + max((i for n in shapes if (i := layer_of(n)) is not None), default=-1)
    if not layers or EMBEDDING not in shapes:
        raise LayoutError(f"{ckpt.path}: is no decoder-only language model")
    stages = stages_of_layout(layers, layout)
    check_fits(shapes, args, layout, latent_rows=rows)
    padded = padded_vocabulary(shapes[EMBEDDING][0], args, layout)
    grouped = bool(args.get("moe_grouped_gemm"))
    order = state_order(args, grouped=grouped)
    moe = frozenset(i for n in shapes if ".mlp.experts." in n and (i := layer_of(n)) is not None)
    weights = pad_vocabulary(ckpt.weights, padded)
    weights = {n: weights[n] for n in sorted(weights, key=order)}
    return Division(
        weights=weights,
        args=args,
        layout=layout,
        stages=stages,
        cuts=_cuts(weights, args, layout, rows),
        spelling=Spelling(
            engine=impl != "local",
            latent=latent,
            grouped=grouped,
            moe=moe,
            layers=layers,
            stacked=not moe or len(moe) == layers,
        ),
        experts=experts_in(shapes),
        tied=HEAD not in weights,
        padded=padded,
        held=_held(weights, stages),
    )


def _cuts(
    weights: Tensors, args: Mapping[str, object], layout: Layout, rows: bool
) -> dict[str, Placement]:
    dense: dict[str, Index] = {n: t.shape for n, t in weights.items() if not is_expert(n)}
    routed: dict[str, Index] = {n: t.shape for n, t in weights.items() if is_expert(n)}
    return {
        **cuts_of(dense, layout.tp, args, latent_rows=rows),
        **cuts_of(routed, layout.etp or layout.tp, args, latent_rows=rows),
    }


def padded_vocabulary(size: int, args: Mapping[str, object], layout: Layout) -> int:
    """Rows that Megatron gives a vocabulary (``megatron/training/tokenizer``)."""
    saved = number(args, "make_vocab_size_divisible_by")
    unit = (layout.make_vocab_divisible_by or saved or DIVISIBLE) * layout.tp
    return -(-size // unit) * unit


def pad_vocabulary(tensors: Tensors, padded: int) -> dict[str, LazyTensor]:
    """The tensors, rows of zeros added to those that have one per token."""
    out = dict(tensors)
    for name in _VOCABULARY:
        tensor = out.get(name)
        if tensor is not None and tensor.shape[0] < padded:
            missing = (padded - tensor.shape[0], *tensor.shape[1:])
            out[name] = concat([tensor, zeros(missing, tensor.dtype)])
    return out
