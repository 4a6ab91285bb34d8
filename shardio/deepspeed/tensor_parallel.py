"""How a DeepSpeed checkpoint is cut over tensor-parallel ranks, and how it is put together.

``universal_checkpoint_info`` (Megatron-DeepSpeed, and AutoTP since 0.19) says it by regular
expressions, or exactly by an ``affine_map``; rules and their order follow
``deepspeed/checkpoint/ds_to_universal.py`` (merge_tp_slices). Checkpoints without it are read by
the usual names of the layers (``tp_names``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import FormatError, LayoutError, UnsupportedError
from ..placement import Fused, Placement, Replicate, Shard
from ..tensor import LazyTensor
from . import tp_names
from .affine import Affine, read_affine
from .fused import Average, Blocks
from .patterns import Patterns

_LISTS = {
    "replicated": "tp_replicated_parameter_patterns",
    "average": "parameter_to_average_patterns",
    "halves": "parameter_with_2_sub_params_cat_dim_0",
    "row": "parameter_with_row_parallelism_patterns",
    "vocabulary": "vocabulary_parameter_patterns",
}


@dataclass(frozen=True, slots=True)
class SubParams:
    """Matrices that are fused in one parameter.

    Attributes:
        sizes: along ``dim`` in the whole parameter; empty for ``count`` equal ones.
        count: how many.
        dim: the dim they are joined and cut on.
        ndim: dims of the view that ``dim`` refers to.
    """

    sizes: tuple[int, ...]
    count: int
    dim: int
    ndim: int


@dataclass(frozen=True, slots=True)
class Rules:
    """The cutting rules of one checkpoint.

    Attributes:
        source: file they come from, for messages.
        patterns: rule name to the parameters it is for; None when the checkpoint has no rules.
        sub_params: sizes of fused matrices (or how many equal ones), and the dim they are joined
            on.
        widths: size of each fused matrix on each rank, for uneven cuts.
        refused: reasons why DeepSpeed itself cannot merge a parameter.
        affine: exact maps.
        vocab: rows of the vocabulary without padding, None if unknown.
        hints: model settings for checkpoints without rules.
    """

    source: str
    patterns: Mapping[str, Patterns[bool]] | None
    sub_params: Patterns[SubParams]
    widths: Patterns[tuple[tuple[int, ...], ...]]
    refused: Patterns[str]
    affine: Patterns[Affine]
    vocab: int | None
    hints: Mapping[str, Any]

    def placement(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Placement:
        """Return how a parameter is cut.

        Args:
            name: the framework's name of it.
            shapes: of the parts, in rank order.

        Raises:
            UnsupportedError: nothing says how it is cut.
            LayoutError: the rule does not fit the shapes.
        """
        reason = self.refused.get(name)
        if reason is not None:
            raise UnsupportedError(f"{self.source}: {name!r} cannot be merged: {reason}")
        affine = self.affine.get(name)
        if affine is not None:
            return affine
        if self.patterns is None:
            return tp_names.placement(name, shapes, self.hints, self.source)
        if not shapes[0] or self._is("replicated", name):
            return Replicate()
        if self._is("average", name):
            return Average()
        if self._is("halves", name):
            half, odd = divmod(sum(s[0] for s in shapes), 2)
            if odd:
                raise LayoutError(f"{self.source}: {name!r} has two halves, but shards {shapes}")
            return Fused(0, (half, half))
        fused = self.sub_params.get(name)
        if fused is not None:
            return self._fused(name, shapes, fused)
        return Shard(1 if self._is("row", name) and len(shapes[0]) > 1 else 0)

    def rows(self, name: str) -> int | None:
        """Rows to keep of a padded vocabulary tensor; None for other tensors."""
        return self.vocab if self._is("vocabulary", name) else None

    def _is(self, rule: str, name: str) -> bool:
        return self.patterns is not None and name in self.patterns[rule]

    def _fused(self, name: str, shapes: Sequence[tuple[int, ...]], fused: SubParams) -> Placement:
        dim, ndim = fused.dim, len(shapes[0])
        if dim >= ndim or (dim and ndim != fused.ndim):
            raise UnsupportedError(
                f"{self.source}: {name!r} is fused along dim {dim} of a {fused.ndim}-dim view; its "
                f"shards are {list(shapes)}"
            )
        widths = self.widths.get(name)
        if widths is not None:
            return Blocks(dim, widths)
        total = sum(s[dim] for s in shapes)
        sizes = fused.sizes or (total // fused.count,) * fused.count
        if sum(sizes) != total:
            raise LayoutError(
                f"{self.source}: {name!r} should consist of {sizes} along dim {dim}, its shards "
                f"are {list(shapes)}"
            )
        if any(n % len(shapes) for n in sizes):
            raise UnsupportedError(
                f"{self.source}: {name!r} consists of {sizes}, which {len(shapes)} ranks cannot "
                "share evenly, and the checkpoint does not say how they did"
            )
        return Fused(dim, sizes)


def read_rules(info: object, source: str, hints: Mapping[str, Any]) -> Rules:
    """Read ``universal_checkpoint_info`` (as plain data); without it, rules by layer names.

    Raises:
        FormatError: malformed rules, or patterns that would be slow to match.
    """
    found = info if isinstance(info, dict) else {}
    vocab = found.get("original_vocab_size")

    def table(key: str) -> Patterns[str]:
        return Patterns(((p, str(v)) for p, v in _dict(found, key, source).items()), source)

    def names(key: str) -> Patterns[bool]:
        return Patterns(((p, True) for p in _list(found, key, source)), source)

    return Rules(
        source,
        {rule: names(key) for rule, key in _LISTS.items()} if found else None,
        sub_params=Patterns(
            (pair for s in _list(found, _SUB, source) for pair in _sub_param(s, source)), source
        ),
        widths=Patterns(_widths(found, source), source),
        refused=table("autotp_unsupported_parameter_patterns"),
        affine=Patterns(read_affine(found.get("affine_map"), source).items(), source),
        vocab=vocab if type(vocab) is int and vocab > 0 else None,
        hints=hints,
    )


_SUB = "parameter_with_sub_params"


def _list(info: Mapping[str, Any], key: str, source: str) -> list[Any]:
    value = info.get(key) or []
    if not isinstance(value, list):
        raise FormatError(f"{source}: universal_checkpoint_info.{key}: expected a list")
    return value


def _dict(info: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    value = info.get(key) or {}
    if not isinstance(value, dict):
        raise FormatError(f"{source}: universal_checkpoint_info.{key}: expected a dictionary")
    return value


def _sub_param(value: object, source: str) -> list[tuple[object, SubParams]]:
    """Read one entry:

    ``shape[partition_dim]`` lists the sizes, or (before 0.4) counts equal ones.
    """
    if isinstance(value, dict):
        shape, dim = value.get("shape"), value.get("partition_dim")
        patterns = value.get("patterns")
        if isinstance(shape, list) and isinstance(patterns, list) and type(dim) is int:
            what = shape[dim] if 0 <= dim < len(shape) else None
            if type(what) is int and 0 < what < 2**20:
                return [(p, SubParams((), what, dim, len(shape))) for p in patterns]
            if isinstance(what, list) and what and all(type(n) is int and n >= 0 for n in what):
                return [(p, SubParams(tuple(what), len(what), dim, len(shape))) for p in patterns]
    raise FormatError(f"{source}: universal_checkpoint_info.{_SUB}: malformed entry")


def _widths(
    info: Mapping[str, Any], source: str
) -> list[tuple[object, tuple[tuple[int, ...], ...]]]:
    found: list[tuple[object, tuple[tuple[int, ...], ...]]] = []
    for pattern, blocks in _dict(info, "sub_param_shard_widths", source).items():
        ok = isinstance(blocks, list) and all(isinstance(b, list) for b in blocks)
        if not ok or any(type(n) is not int or n < 0 for b in blocks for n in b):
            raise FormatError(f"{source}: sub_param_shard_widths of {pattern!r} is malformed")
        found.append((pattern, tuple(tuple(b) for b in blocks)))
    return found


def merge(placement: Placement, parts: Sequence[LazyTensor], where: str) -> LazyTensor:
    """Put the parts of one tensor together.

    Raises:
        LayoutError: shapes that do not fit.
    """
    try:
        return placement.assemble(parts)
    except ValueError as e:
        raise LayoutError(f"{where}: the tensor-parallel parts do not fit together: {e}") from None
