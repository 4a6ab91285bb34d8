"""Which layers of a PipelineModule each stage holds.

DeepSpeed cuts the list of layers when training starts and saves neither the list nor the method, so
both are taken from what a checkpoint shows: the numbers of its layer files, and which parameters
each stage's optimizer had. Rules after ``PipelineModule._partition_layers`` and
``runtime/utils.py`` (``partition_uniform``, ``partition_balanced``) of DeepSpeed 0.19.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ...errors import LayoutError
from ..layout import demand

Bounds = tuple[int, ...]
METHODS = ("parameters", "uniform", "type")  # in the order they are tried; the first is DeepSpeed's
_TIED = "tied_modules."


@dataclass(frozen=True, slots=True)
class Layers:
    """The list of layers, as far as names and sizes tell it.

    Attributes:
        sizes: trained elements of every layer in the list, those of tied uses included; layers
            without weights have 0.
        blocks: which layers are the repeated ones.
        places: layer of every tensor; of a tied one, all layers that use it.
    """

    sizes: tuple[int, ...]
    blocks: frozenset[int]
    places: Mapping[str, tuple[int, ...]]

    def bounds(self, stages: int, method: str) -> Bounds:
        """First layer of each stage and the end, as a method of DeepSpeed cuts."""
        if method == "uniform":
            return uniform(len(self.sizes), stages)
        if method == "type":
            return balanced([int(n in self.blocks) for n in range(len(self.sizes))], stages)
        return balanced(self.sizes, stages)

    def stages(self, bounds: Bounds) -> list[list[str]]:
        """The tensors of each stage as its optimizer numbers them: tied ones, then by layer."""
        found = []
        for start, end in pairwise(bounds):
            here = [n for n, at in self.places.items() if any(start <= k < end for k in at)]
            found.append(sorted(here, key=lambda n: not n.startswith(_TIED)))
        return found


def uniform(layers: int, stages: int) -> Bounds:
    """Equal numbers of layers, the first stages have one more; too few leave the last empty."""
    if layers <= stages:
        return tuple(min(s, layers) for s in range(stages + 1))
    size, more = divmod(layers, stages)
    return tuple(s * size + min(s, more) for s in range(stages + 1))


def balanced(sizes: Sequence[int], stages: int) -> Bounds:
    """The cut with the least difference between its largest and smallest stage.

    A dynamic program over (layers so far, stages so far); of equal cuts the one that starts its
    last stage latest, as DeepSpeed's does.
    """
    if len(sizes) <= stages:
        return uniform(len(sizes), stages)
    sums = [0, *accumulate(sizes)]
    best: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # cost, largest, smallest, start
    for end in range(1, len(sums)):
        best[end, 1] = (0, sums[end], sums[end], 0)
        for stage in range(2, min(end, stages) + 1):
            for start in range(stage - 1, end):
                _, largest, smallest, _ = best[start, stage - 1]
                own = sums[end] - sums[start]
                largest, smallest = max(largest, own), min(smallest, own)
                known = best.get((end, stage))
                if known is None or largest - smallest <= known[0]:
                    best[end, stage] = (largest - smallest, largest, smallest, start)
    bounds = [len(sizes)]
    for stage in range(stages, 0, -1):
        bounds.append(best[bounds[-1], stage][3])
    return tuple(reversed(bounds))


def read_layers(
    sizes: Mapping[str, int], tied: Mapping[str, str], uses: Mapping[str, Sequence[int]]
) -> Layers:
    """Return the list of layers of a pipeline's names.

    Args:
        sizes: trained elements by name (``{layer}.{name}``, ``tied_modules.{key}.{name}``); 0 for
            buffers and frozen tensors.
        tied: alias in the first layer to the name of a tied tensor.
        uses: further layers that use a tied module, by key.
    """
    first = {owner: int(alias.partition(".")[0]) for alias, owner in tied.items()}
    places: dict[str, tuple[int, ...]] = {}
    for name in sizes:
        if name.startswith(_TIED):
            more = uses.get(name.split(".")[1], ())
            places[name] = tuple(sorted({first[name], *more}))
        else:
            places[name] = (int(name.partition(".")[0]),)
    totals = [0] * (1 + max(k for at in places.values() for k in at))
    shapes: dict[int, tuple[str, ...]] = {}
    for name, at in places.items():
        for layer in at:
            totals[layer] += sizes[name]
            inner = name.partition(".")[2]
            shapes[layer] = (*shapes.get(layer, ()), inner)
    kinds = Counter(s for s in shapes.values() if len(s) > 1)
    usual = kinds.most_common(1)[0][0] if kinds else ()
    blocks = frozenset(layer for layer, s in shapes.items() if s == usual)
    return Layers(tuple(totals), blocks, dict(sorted(places.items(), key=lambda p: p[1][0])))


def choose_bounds(
    layers: Layers, pp: int, asked: Sequence[int] | None, known: Sequence[Sequence[int]]
) -> tuple[Bounds, str]:
    """Return where the stages begin, and how that was found, in words.

    Args:
        layers: the list.
        pp: wanted stages.
        asked: layers per stage, where the user says so.
        known: layers with weights of each stage of the source; empty if not known.

    Raises:
        LayoutError: a sum that is not the number of layers, or a stage without weights.
    """
    count = len(layers.sizes)
    if asked is not None:
        return _asked(layers, pp, asked), "as --pp-layers says"
    if len(known) == pp and all(known):
        starts = [min(stage) for stage in known]
        return (0, *starts[1:], count), "as in the source"
    methods = _methods(layers, known)
    method = methods[0]

    def problem(size: int) -> str | None:
        stages = layers.stages(layers.bounds(size, method))
        return None if all(stages) else f"the list of {count} layers leaves a stage without weights"

    demand("pp", pp, count, problem)
    bounds = layers.bounds(pp, method)
    others = [m for m in methods[1:] if layers.bounds(pp, m) != bounds]
    also = f" ({' and '.join(map(repr, others))} would fit the source too)" if others else ""
    return bounds, f"as partition_method={method!r} cuts{also}"


def _asked(layers: Layers, pp: int, asked: Sequence[int]) -> Bounds:
    count = len(layers.sizes)
    if len(asked) != pp:
        raise LayoutError(f"--pp-layers names {len(asked)} stages, pp={pp}")
    bounds = (0, *accumulate(asked))
    if bounds[-1] < count:
        raise LayoutError(
            f"--pp-layers {','.join(map(str, asked))} sums up to {bounds[-1]}; the list of layers "
            f"(embedding, norm and head count too) has at least {count}"
        )
    if not all(layers.stages(bounds)):
        raise LayoutError(f"--pp-layers {','.join(map(str, asked))}: a stage holds no weights")
    return bounds


def _methods(layers: Layers, known: Sequence[Sequence[int]]) -> list[str]:
    """The methods that cut as the source is cut; DeepSpeed's own where that tells nothing."""
    want = [set(stage) for stage in known]
    found = []
    for method in METHODS if len(known) > 1 else ():
        bounds = layers.bounds(len(known), method)
        cuts = [set(range(a, b)) for a, b in pairwise(bounds)]
        if all(w <= cut for w, cut in zip(want, cuts, strict=True)):
            found.append(method)
    return found or [METHODS[0]]
