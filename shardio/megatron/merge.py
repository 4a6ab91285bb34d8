"""From what each rank holds to whole tensors with global names.

Three steps, the same for weights and for optimizer states: ``spell`` brings one rank's tensors into
the canonical spelling (one tensor per expert, QKV rows in the order of today), ``collect`` files
them under their global layer and expert numbers, ``assemble`` joins the ranks of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import FormatError, LayoutError
from ..box import Index
from ..placement import Placement, Replicate, Stage
from ..tensor import LazyTensor
from .cuts import Facts, placement_of
from .names import canonical, expert_of, is_expert, layer_of, shift_expert, shift_layer
from .settings import Sizes, number

Coord = tuple[int, int, int]  # (tp, ep, pp)
_GROUPED = re.compile(r"^(.*\.mlp\.experts)\.weight([12])$")
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


@dataclass(frozen=True, slots=True)
class RankPart:
    """Tensors of one model chunk on one rank, under their saved names, in saved order.

    Attributes:
        tp, pp, ep: the rank.
        chunk: virtual pipeline chunk.
        where: file, for messages.
        tensors: saved name to tensor.
    """

    tp: int
    pp: int
    ep: int
    chunk: int
    where: str
    tensors: Mapping[str, LazyTensor]


@dataclass(frozen=True, slots=True)
class World:
    """What holds for the whole checkpoint.

    Attributes:
        sizes: parallel sizes.
        args: saved settings.
        version: checkpoint_version (below 2 the QKV rows have another order).
        offsets: (pp, chunk) to the global number of its first layer.
        local_experts: experts per expert rank.
        tied: output layer and embedding are one tensor.
    """

    sizes: Sizes
    args: Mapping[str, object]
    version: float
    offsets: Mapping[tuple[int, int], int]
    local_experts: int
    tied: bool


@dataclass(slots=True)
class Whole:
    """Whole tensors by global name, with their further copies and placements."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    replicas: dict[str, tuple[LazyTensor, ...]] = field(default_factory=dict)
    placements: dict[str, dict[str, Placement]] = field(default_factory=dict)


def layer_offsets(parts: Sequence[RankPart], sizes: Sizes) -> dict[tuple[int, int], int]:
    """Return the global number of the first layer of each (stage, chunk).

    Layers are counted where they are, in the order of execution (chunk by chunk, stage by stage),
    which reproduces even, uneven and custom pipeline layouts alike.

    Raises:
        LayoutError: gaps in the numbers, or a sum that contradicts ``args.num_layers``.
    """
    counts: dict[tuple[int, int], set[int]] = {}
    for part in parts:
        layers = {n for name in part.tensors if (n := layer_of(canonical(name))) is not None}
        known = counts.setdefault((part.chunk, part.pp), layers)
        if known != layers:
            raise LayoutError(
                f"{part.where}: holds layers {sorted(layers)}, another rank of stage {part.pp} "
                f"holds {sorted(known)}"
            )
    offsets: dict[tuple[int, int], int] = {}
    total = 0
    for (chunk, stage), layers in sorted(counts.items()):
        n = len(layers)
        if layers == set(range(n)):
            offsets[stage, chunk] = total
        elif layers == set(range(total, total + n)):
            offsets[stage, chunk] = 0  # some tools write global numbers
        else:
            raise LayoutError(
                f"stage {stage}, chunk {chunk}: layer numbers {sorted(layers)} have gaps; expected "
                f"0..{n - 1}"
            )
        total += n
    if sizes.layers is not None and total and total != sizes.layers:
        raise LayoutError(f"the stages hold {total} layers, args.num_layers is {sizes.layers}")
    return offsets


def spell(part: RankPart, world: World) -> Iterator[tuple[str, LazyTensor]]:
    """Yield (canonical name, tensor) of a rank, layer and expert numbers still local."""
    for saved, tensor in part.tensors.items():
        name = canonical(saved)
        grouped = _GROUPED.match(name)
        if grouped:
            yield from _experts_of(grouped[1], grouped[2], tensor, world.local_experts, part.where)
        elif world.version < 2 and ".linear_qkv." in name:
            yield name, _modern_qkv(tensor, world)
        else:
            yield name, tensor


def _experts_of(
    prefix: str, which: str, tensor: LazyTensor, count: int, where: str
) -> Iterator[tuple[str, LazyTensor]]:
    """Split GroupedMLP's weight into experts.

    weight1 is declared (hidden, experts * rows) and weight2 (experts * columns, hidden), but both
    lie in memory as (experts, in, out): transposed linears one after the other.
    """
    hidden = (tensor.shape[0] if which == "1" else tensor.shape[-1]) if tensor.ndim == 2 else 0
    if not count or not hidden or tensor.size % (count * hidden):
        raise LayoutError(
            f"{where}: {prefix}.weight{which} of shape {tensor.shape} does not hold {count} experts"
        )
    inner = tensor.size // (count * hidden)
    split = (hidden, inner) if which == "1" else (inner, hidden)
    stacked = tensor.reshape((count, *split))
    for e in range(count):
        name = f"{prefix}.local_experts.{e}.linear_fc{which}.weight"
        yield name, stacked.slice([slice(e, e + 1)]).reshape(split).permute((1, 0))


def _modern_qkv(tensor: LazyTensor, world: World) -> LazyTensor:
    """Bring QKV rows of checkpoint versions 0 and 1 into today's [heads, 3, head_dim] order."""
    heads = (number(world.args, "num_attention_heads") or 0) // world.sizes.tp
    rows, rest = tensor.shape[0], tensor.shape[1:]
    if not heads or rows % (3 * heads):
        raise LayoutError(f"checkpoint version {world.version}: {rows} QKV rows for {heads} heads")
    dim = rows // (3 * heads)
    tail = tuple(range(3, 3 + len(rest)))
    if world.version < 1:  # [3, heads, head_dim]
        return (
            tensor.reshape((3, heads, dim, *rest)).permute((1, 0, 2, *tail)).reshape(tensor.shape)
        )
    return tensor.reshape((heads, dim, 3, *rest)).permute((0, 2, 1, *tail)).reshape(tensor.shape)


Held = dict[str, dict[Coord, tuple[LazyTensor, str]]]  # tensor and its file


def collect(parts: Iterable[RankPart], world: World) -> Held:
    """Return {global name: {(tp, ep, pp): (tensor, file)}}.

    Outside the layers two stages may hold one tensor (the embedding, where it is needed again).

    Raises:
        FormatError: two files that claim the same part of the model.
    """
    held: Held = {}
    for part in sorted(parts, key=lambda p: (p.chunk, p.pp, p.ep, p.tp)):
        offset = world.offsets.get((part.pp, part.chunk), 0)
        for local, tensor in spell(part, world):
            name = shift_expert(shift_layer(local, offset), part.ep * world.local_experts)
            ranks = held.setdefault(name, {})
            here = (part.tp, part.ep, part.pp)
            if here in ranks or (ranks and ".layers." in name and _stage(ranks) != part.pp):
                known = ranks.get(here) or next(iter(ranks.values()))
                raise FormatError(
                    f"{part.where}: {name} is also in {known[1]}; the files do not belong together"
                )
            ranks[here] = (tensor, part.where)
    return held


def _stage(ranks: Mapping[Coord, object]) -> int:
    return next(iter(ranks))[2]


def assemble(held: Held, world: World) -> Whole:
    """Join the ranks of every tensor.

    Raises:
        FormatError: a rank does not hold its part.
        LayoutError: shapes that do not fit together.
        UnsupportedError: tensors that no rule covers.
    """
    whole = Whole()
    shapes: dict[str, Index] = {n: next(iter(r.values()))[0].shape for n, r in held.items()}
    for name, ranks in held.items():
        expert = is_expert(name) and expert_of(name) is not None
        count = world.sizes.etp if expert else world.sizes.tp
        copies = _line_up(name, ranks, count)
        facts = Facts(name, count, shapes, world.args)
        try:
            _join(whole, name, copies, facts, expert)
        except ValueError as e:
            raise LayoutError(f"{name}: parts of the ranks do not fit together: {e}") from e
        _, ep, stage = next(iter(ranks))
        if world.sizes.pp > 1:
            whole.placements.setdefault(name, {})["pp"] = Stage(stage)
        if expert and world.sizes.ep > 1:
            whole.placements.setdefault(name, {})["ep"] = Stage(ep)
    if world.tied and EMBEDDING in whole.tensors and HEAD in whole.tensors:
        head = whole.tensors.pop(HEAD)
        copies_of_head = whole.replicas.pop(HEAD, ())
        whole.placements.pop(HEAD, None)
        whole.replicas[EMBEDDING] = (*whole.replicas.get(EMBEDDING, ()), head, *copies_of_head)
    return whole


def _line_up(
    name: str, ranks: Mapping[Coord, tuple[LazyTensor, str]], count: int
) -> list[list[LazyTensor]]:
    """Return the parts by rank of the axis, for the tensor and for each further copy of it."""
    by_rank: dict[int, list[LazyTensor]] = {}
    for (tp, _, _), (tensor, where) in ranks.items():
        by_rank.setdefault(tp % count, []).append(tensor)
        if tensor.dtype != by_rank[tp % count][0].dtype:
            raise FormatError(f"{where}: {name} is {tensor.dtype} here, another type elsewhere")
    missing = sorted(set(range(count)) - set(by_rank))
    if missing:
        files = ", ".join(sorted({where for _, where in ranks.values()})[:4])
        raise FormatError(
            f"{name}: tensor parallel ranks {missing} do not hold their part of it (found in "
            f"{files}); the files do not belong together"
        )
    depth = max(len(tensors) for tensors in by_rank.values())
    return [
        [by_rank[r][k] if k < len(by_rank[r]) else by_rank[r][0] for r in range(count)]
        for k in range(depth)
    ]


def _join(
    whole: Whole, name: str, copies: list[list[LazyTensor]], facts: Facts, expert: bool
) -> None:
    cut = placement_of(facts)
    if isinstance(cut, Replicate):
        flat = [t for parts in copies for t in parts]
        unique = list({id(t): t for t in flat}.values())
        whole.tensors[name], others = unique[0], unique[1:]
        bad = [t.shape for t in others if t.shape != unique[0].shape]
        if bad:
            raise LayoutError(f"{name}: copies have shapes {unique[0].shape} and {bad[0]}")
    else:
        joined = [cut.assemble(parts) for parts in copies]
        whole.tensors[name], others = joined[0], joined[1:]
        whole.placements.setdefault(name, {})["etp" if expert else "tp"] = cut
    if others:
        whole.replicas[name] = tuple(others)
