"""A declarative two-way table between the tensor names of a foreign world and Hugging Face's.

One ``Rule`` per kind of tensor: name patterns on both sides with the placeholders ``{i}`` (layer)
and ``{e}`` (expert), and a named transform with an inverse. A placeholder on one side only means
that the tensors of that side are one list for the transform (stacked experts). Mapping is total:
names that no rule knows and tensors that should be there are all reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ...errors import ConfigError, LayoutError, counted, did_you_mean
from ...shardio.tensor import LazyTensor
from .transforms import TRANSFORMS, Sizes, Transform

_PLACE = re.compile(r"\{(\w+)\}")
_SHOWN = 8
_VALUES = ("", "master")  # states that hold the weights' own values

Values = tuple[tuple[str, int], ...]  # placeholder values, sorted


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of tensor.

    Attributes:
        left: name patterns of the foreign world.
        right: name patterns of Hugging Face.
        how: the transform from left to right, or its name.
        need: what the rule provides to every model (or layer), such as ``attention norm``; empty
            for what only some models have. Rules with the same need are alternatives; ``a|b``
            provides both.
    """

    left: tuple[str, ...]
    right: tuple[str, ...]
    how: str | Transform = "same"
    need: str = ""

    @property
    def needs(self) -> list[str]:
        """All that it provides."""
        return self.need.split("|") if self.need else []


def rule(
    left: str, right: str | tuple[str, ...], how: str | Transform = "same", need: str = ""
) -> Rule:
    """Short form of ``Rule`` for tables."""
    return Rule((left,), (right,) if isinstance(right, str) else right, how, need)


@dataclass(frozen=True, slots=True)
class _Side:
    """Where a pattern belongs: rule, position on its side, placeholders, fixed numbers."""

    rule: int
    position: int
    places: tuple[str | int, ...]


@dataclass(slots=True)
class _Group:
    """The tensors of one application of a rule."""

    rule: int
    values: Values
    members: dict[tuple[int, Values], LazyTensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Table:
    """Rules of one model family.

    Attributes:
        name: the family, for messages.
        rules: its lines.
    """

    name: str
    rules: tuple[Rule, ...]

    def to_hf(
        self, tensors: Mapping[str, LazyTensor], sizes: Sizes, state: str = ""
    ) -> dict[str, LazyTensor]:
        """Return the tensors under Hugging Face names.

        Args:
            tensors: by foreign name.
            sizes: of the model.
            state: empty for weights. In an optimizer state nothing is required to be there, and
                only ``master`` copies go through transforms that change values.

        Raises:
            ConfigError: unknown names, missing tensors, shapes that do not fit; all in one message.
        """
        return self._apply(tensors, sizes, state, forward=True)

    def from_hf(
        self, tensors: Mapping[str, LazyTensor], sizes: Sizes, state: str = ""
    ) -> dict[str, LazyTensor]:
        """The inverse of ``to_hf``, with the same arguments and errors."""
        return self._apply(tensors, sizes, state, forward=False)

    def rename(self, name: str, *, forward: bool = True) -> str | None:
        """Return the other world's name of a tensor that stays one tensor, else None."""
        hit = _find(self._index(forward), name)
        if hit is None:
            return None
        side, values = hit
        targets = self._sides(self.rules[side.rule], forward)[1]
        return targets[0].format(**dict(values)) if len(targets) == 1 else None

    def counterparts(
        self, names: Iterable[str], sizes: Sizes, *, forward: bool = True
    ) -> list[str]:
        """Return the other world's names of tensors, fused, split or stacked; unknown ones drop."""
        index = self._index(forward)
        found: dict[str, None] = {}
        for name in names:
            hit = _find(index, name)
            if hit is None:
                continue
            line = self.rules[hit[0].rule]
            shared = tuple(v for v in hit[1] if v[0] in _shared(line))
            found |= {n: None for _, n in _expand(self._sides(line, forward)[1], shared, sizes)}
        return list(found)

    # -- application ---------------------------------------------------------------------------

    def _apply(
        self, tensors: Mapping[str, LazyTensor], sizes: Sizes, state: str, *, forward: bool
    ) -> dict[str, LazyTensor]:
        if not state:
            _refuse_lies(tensors, sizes)
        groups, problems = self._grouped(tensors, forward)
        out: dict[str, LazyTensor] = {}
        for group in groups:
            try:
                made = self._transform(group, sizes, forward, state)
            except _ProblemError as e:
                problems.append(str(e))
                continue
            for name, tensor in made:
                if name in out:
                    problems.append(f"{name} would be made twice")
                out[name] = tensor
        if not state:
            problems += self._missing(groups, sizes)
        if problems:
            more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            shown = "\n".join(f"  {p}" for p in problems[:_SHOWN])
            raise ConfigError(
                f"{counted(len(problems), 'tensor does', 'tensors do')} "
                f"not fit the {self.name} model:\n{shown}{more}\n"
                "A config.json of another model_type may fit (--config), or the checkpoint is not "
                "whole"
            )
        return out

    def _grouped(
        self, tensors: Mapping[str, LazyTensor], forward: bool
    ) -> tuple[list[_Group], list[str]]:
        index = self._index(forward)
        groups: dict[tuple[int, Values], _Group] = {}
        problems: list[str] = []
        for name, tensor in tensors.items():
            hit = _find(index, name)
            if hit is None:
                few = len(problems) < _SHOWN
                hint = did_you_mean(name, self._known(name, forward)) if few else ""
                problems.append(f"unknown: {name} {list(tensor.shape)}{hint}")
                continue
            side, values = hit
            shared = _shared(self.rules[side.rule])
            common = tuple(v for v in values if v[0] in shared)
            own = tuple(v for v in values if v[0] not in shared)
            group = groups.setdefault((side.rule, common), _Group(side.rule, common))
            group.members[side.position, own] = tensor
        return list(groups.values()), problems

    def _transform(
        self, group: _Group, sizes: Sizes, forward: bool, state: str
    ) -> Iterator[tuple[str, LazyTensor]]:
        line = self.rules[group.rule]
        sources, targets = self._sides(line, forward)
        wanted = list(_expand(sources, group.values, sizes))
        present = [group.members.get(key) for key, _ in wanted]
        inputs = [t for t in present if t is not None]
        if len(inputs) < len(wanted):
            names = [name for (_, name), t in zip(wanted, present, strict=True) if t is None]
            raise _ProblemError(f"missing: {', '.join(names[:4])} (parts of it are there)")
        if len(group.members) > len(wanted):
            raise _ProblemError(f"{sources[0]}: more than {len(wanted)} of them")
        transform = TRANSFORMS[line.how] if isinstance(line.how, str) else line.how
        if state not in _VALUES:
            transform = transform.for_moments(state)
        try:
            step = transform.forward if forward else transform.inverse
            outputs = step(inputs, sizes)
        except (ValueError, LayoutError) as e:
            raise _ProblemError(f"{wanted[0][1]} {list(inputs[0].shape)}: {e}") from e
        names = [name for _, name in _expand(targets, group.values, sizes)]
        return zip(names, outputs, strict=True)

    def _missing(self, groups: Sequence[_Group], sizes: Sizes) -> list[str]:
        """What every model or layer needs and no group provides."""
        seen: dict[tuple[str, int | None], set[int]] = {}
        for group in groups:
            values = dict(group.values)
            for need in self.rules[group.rule].needs:
                experts = seen.setdefault((need, values.get("i")), set())
                if "e" in values:
                    experts.add(values["e"])
        problems = []
        for need, layered in self._needs().items():
            if need == "head" and sizes.tied:
                continue
            for i in range(sizes.layers) if layered else (None,):
                if (need, i) not in seen:
                    place = "" if i is None else f" of layer {i}"
                    problems.append(f"missing: the {need}{place}")
        for (need, i), experts in seen.items():
            lost = sorted(set(range(sizes.experts)) - experts) if experts else []
            if lost:
                problems.append(f"missing: the {need} of experts {lost[:6]} in layer {i}")
            if experts and max(experts) >= sizes.experts:
                problems.append(f"expert {max(experts)} is beyond the {sizes.experts} of layer {i}")
            if i is not None and i >= sizes.layers:
                problems.append(f"layer {i} is beyond the model's {sizes.layers} layers")
        return problems

    def _needs(self) -> dict[str, bool]:
        """Need -> whether each layer has it."""
        return {need: "{i}" in r.left[0] for r in self.rules for need in r.needs}

    # -- patterns ------------------------------------------------------------------------------

    @staticmethod
    def _sides(line: Rule, forward: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (line.left, line.right) if forward else (line.right, line.left)

    def _index(self, forward: bool) -> dict[str, list[_Side]]:
        """Pattern without numbers -> where it belongs."""
        index: dict[str, list[_Side]] = {}
        for k, line in enumerate(self.rules):
            for position, pattern in enumerate(self._sides(line, forward)[0]):
                words = pattern.split(".")
                places: list[str | int] = []
                for w in words:
                    if m := _PLACE.fullmatch(w):
                        places.append(m[1])
                    elif w.isdigit():
                        places.append(int(w))
                shape = ".".join("#" if _PLACE.fullmatch(w) or w.isdigit() else w for w in words)
                index.setdefault(shape, []).append(_Side(k, position, tuple(places)))
        return index

    def _known(self, name: str, forward: bool) -> list[str]:
        """Names like ``name`` that the table knows, for a hint."""
        numbers = [int(w) for w in name.split(".") if w.isdigit()] or [0]
        values = {"i": numbers[0], "e": numbers[-1]}
        return [p.format(**values) for r in self.rules for p in self._sides(r, forward)[0]]


@lru_cache(maxsize=4096)
def _places(pattern: str) -> tuple[str, ...]:
    """Placeholders of a pattern."""
    return tuple(_PLACE.findall(pattern))


def _refuse_lies(tensors: Mapping[str, LazyTensor], sizes: Sizes) -> None:
    """Refuse numbers of layers and experts over which loops would not end: there is a tensor for
    each, or a dim of a stacked one.
    """
    most = max([len(tensors), *(n for t in tensors.values() for n in t.shape)])
    for what, count in (("layers", sizes.layers), ("experts", sizes.experts)):
        if count > most:
            raise ConfigError(f"the config says {count} {what}: {len(tensors)} tensors are too few")


@lru_cache(maxsize=1024)
def _shared(line: Rule) -> frozenset[str]:
    """Placeholders that both sides of a rule have."""
    left, right = ({p for n in side for p in _places(n)} for side in (line.left, line.right))
    return frozenset(left & right)


class _ProblemError(Exception):
    """One line of the report."""


def _find(index: Mapping[str, list[_Side]], name: str) -> tuple[_Side, Values] | None:
    words = name.split(".")
    shape = ".".join("#" if w.isdigit() else w for w in words)
    numbers = [int(w) for w in words if w.isdigit()]
    for side in index.get(shape, ()):
        values: dict[str, int] = {}
        for place, n in zip(side.places, numbers, strict=True):
            if place != n if isinstance(place, int) else values.setdefault(place, n) != n:
                break
        else:
            return side, tuple(sorted(values.items()))
    return None


def _expand(
    patterns: Sequence[str], values: Values, sizes: Sizes
) -> Iterator[tuple[tuple[int, Values], str]]:
    """Yield ((position, own placeholder values), name) of all tensors of a side, in order."""
    known = dict(values)
    for position, pattern in enumerate(patterns):
        own = [p for p in _places(pattern) if p not in known]
        if not own:
            yield (position, ()), pattern.format(**known)
            continue
        assert own == ["e"], f"only experts can be one-sided: {pattern}"
        for e in range(sizes.experts):
            yield (position, (("e", e),)), pattern.format(**known, e=e)
