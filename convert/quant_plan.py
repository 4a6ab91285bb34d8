"""From tensors and targets to planned outputs: which type each tensor gets and how it is encoded.

Shared by ``mconv quantize`` (a GGUF comes in) and ``mconv to-gguf`` (anything comes in). With
several targets the payloads of a tensor form one group, so its rows are read once for all outputs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ..errors import QuantError, counted, did_you_mean
from ..quant import ErrorSums, GgmlType
from ..quant.recipes import (
    Choice,
    ModelFacts,
    RecipeOptions,
    Target,
    TensorRecord,
    choose,
    compile_pattern,
    unmet_importance,
)
from ..shardio.payload import Payload
from ..shardio.tensor import LazyTensor
from .gguf import TensorSpec
from .gguf.encode import Encoding, copied, encoded
from .gguf.files import OutTensor
from .imatrix import ImportanceMatrix

_NAMES_SHOWN = 5
_KINDS_SHOWN = 12
_CHECKED = ("F32", "F16", "BF16")  # read even where they stay, to find NaN and infinity
_UNMEASURED = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor to be written.

    Attributes:
        name: in the output.
        origin: name that an importance matrix knows it by.
        type: what it is stored as, or would be without quantization.
        values: its values, any float dtype.
        stored: the bytes to copy where the type stays (uint8 rows for block types); None makes
            them from the values.
    """

    name: str
    origin: str
    type: GgmlType
    values: LazyTensor
    stored: LazyTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape without leading ones, as ggml writes it."""
        return TensorRecord(self.name, self.values.shape or (1,), self.type).dims


@dataclass(frozen=True, slots=True)
class Care:
    """How blocks are encoded.

    Attributes:
        best: search for less error than llama-quantize leaves.
        measure: add up the errors of every tensor that is quantized.
    """

    best: bool = False
    measure: bool = False


ORDINARY = Care()
"""llama-quantize's bytes, no report."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of one output.

    Attributes:
        name: in the output.
        shape: row-major.
        source_type, type: before and after.
        nbytes: bytes in the output.
        note: why the type is not the mix's own, or empty.
        errors: the quantization errors, filled while the tensor is written, if asked for.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: GgmlType
    nbytes: int
    note: str
    errors: ErrorSums | None = None


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """One output, planned.

    Attributes:
        target: the mix.
        tensors: what becomes of each tensor, in file order.
        out: the same with payloads.
        unmet: names of tensors that need importance and have none.
    """

    target: Target
    tensors: tuple[PlannedTensor, ...]
    out: tuple[OutTensor, ...]
    unmet: tuple[str, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight, over all tensors."""
        return 8 * self.data_bytes / max(1, sum(prod(t.shape) for t in self.tensors))


def plan_targets(
    sources: Sequence[SourceTensor],
    targets: Sequence[Target],
    facts: ModelFacts,
    options: RecipeOptions,
    importance: ImportanceMatrix | None = None,
    *,
    care: Care = ORDINARY,
    allow_requantize: bool = False,
) -> list[TargetPlan]:
    """Plan one output per target.

    Args:
        sources: the model's tensors.
        targets: what to make.
        facts: about the model.
        options: the user's changes to the recipes.
        importance: measured importance.
        care: least error, and its report.
        allow_requantize: whether blocks may be decoded and encoded as other blocks.

    Raises:
        QuantError: blocks would be requantized without permission, an impossible type, or a pattern
            that no tensor matches.
        FormatError: the importance matrix does not fit.
    """
    options = replace(options, has_importance=importance is not None)
    by_name = {s.name: s for s in sources}
    _refuse_idle_patterns(options, list(by_name))
    records = [TensorRecord(s.name, s.values.shape or (1,), s.type) for s in sources]
    chosen = [choose(records, target, facts, options) for target in targets]
    for target, choices in zip(targets, chosen, strict=True):
        if not allow_requantize:
            _refuse_requantizing(choices, by_name, target)
    columns = []
    for row in zip(*chosen, strict=True):  # the choices for one tensor
        source = by_name[row[0].name]
        columns.append(_plan_tensor(source, row, targets, importance, care))
    plans = []
    for k, (target, choices) in enumerate(zip(targets, chosen, strict=True)):
        changed = [c for c in choices if c.type != by_name[c.name].type]
        unmet = unmet_importance(
            changed,
            target,
            lambda name: importance is not None and by_name[name].origin in importance,
        )
        column = [row[k] for row in columns]
        plans.append(
            TargetPlan(
                target,
                tuple(planned for planned, _ in column),
                tuple(_out(planned, payload) for planned, payload in column),
                tuple(c.name for c in unmet),
            )
        )
    return plans


def _refuse_idle_patterns(options: RecipeOptions, names: Sequence[str]) -> None:
    """A pattern that matches nothing is a slip: what it was to protect would be quantized."""
    for pattern, kind in options.tensor_types if names else ():
        if any(map(compile_pattern(pattern).search, names)):
            continue
        parts = dict.fromkeys(name.split(".")[-2] for name in names if "." in name)
        hints = (did_you_mean(word.lower(), parts) for word in re.findall(r"\w{3,}", pattern))
        shapes = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names)
        shown = list(shapes)[:_KINDS_SHOWN]
        more = ", ..." if len(shapes) > len(shown) else ""
        raise QuantError(
            f"--tensor-type {pattern}={kind} matches no tensor{next(filter(None, hints), '')}; "
            f"there are {', '.join(shown)}{more}"
        )


def require_importance(plan: TargetPlan) -> None:
    """Refuse a plan that would write garbage.

    Raises:
        QuantError: names the tensors that need an importance matrix.
    """
    if not plan.unmet:
        return
    kinds = {t.name: t.type.name for t in plan.tensors}
    raise QuantError(
        f"{plan.target.name} needs an importance matrix for {listed(plan.unmet)} "
        f"(as {kinds[plan.unmet[0]]}): give one with --imatrix, choose a type with more bits "
        "(Q3_K_S, IQ4_XS, ...), or set --tensor-type for these"
    )


def _uncovered(plan: TargetPlan, sources: Sequence[SourceTensor], matrix: ImportanceMatrix) -> str:
    """Return a warning about tensors that are encoded without importance, or an empty string."""
    origin = {s.name: s.origin for s in sources}
    bare = [
        t.name
        for t in plan.tensors
        if t.type.is_quantized
        and t.source_type != t.type.name
        and t.name not in _UNMEASURED
        and origin[t.name] not in matrix
    ]
    if not bare:
        return ""
    return f"{plan.target.name}: the importance matrix has no entry for {listed(bare)}"


def plan_warnings(
    plans: Sequence[TargetPlan], sources: Sequence[SourceTensor], matrix: ImportanceMatrix | None
) -> tuple[str, ...]:
    """Return what a user should know: missing importance, types that were replaced."""
    out = []
    if matrix is not None:
        problem = matrix.mismatch([s.origin for s in sources])
        if problem:
            out.append(problem)
        else:
            out += filter(None, (_uncovered(plan, sources, matrix) for plan in plans))
    for plan in plans:
        odd = [t.name for t in plan.tensors if "do not fit" in t.note]
        if odd:
            out.append(
                f"{plan.target.name}: {counted(len(odd), 'tensor')} got another type: {listed(odd)}"
            )
        if plan.unmet:
            out.append(f"{plan.target.name}: needs an importance matrix for {listed(plan.unmet)}")
    return tuple(out)


def listed(names: Sequence[str]) -> str:
    """Return names for a message: the first few and how many more."""
    more = len(names) - _NAMES_SHOWN
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {more} more tensors" if more > 0 else shown


def _refuse_requantizing(
    choices: Sequence[Choice], sources: dict[str, SourceTensor], target: Target
) -> None:
    blocks = [
        c.name
        for c in choices
        if sources[c.name].type.is_quantized
        and c.type.is_quantized
        and c.type != sources[c.name].type
    ]
    if blocks:
        raise QuantError(
            f"{listed(blocks)}: already quantized ({sources[blocks[0]].type.name}), and encoding "
            f"again as {target.name} loses quality twice: start from the F16, BF16 or F32 model, "
            "or pass --allow-requantize"
        )


def _plan_tensor(
    source: SourceTensor,
    choices: Sequence[Choice],
    targets: Sequence[Target],
    importance: ImportanceMatrix | None,
    care: Care,
) -> list[tuple[PlannedTensor, Payload]]:
    """Plan one tensor for all targets: (description, payload) each."""
    payloads: list[Payload | None] = []
    wanted: dict[str, Encoding] = {}
    encodings: list[Encoding] = []
    for choice, target in zip(choices, targets, strict=True):
        kind = choice.type
        checked = kind.name in _CHECKED and not target.copies
        if source.stored is not None and kind == source.type and not checked:
            payloads.append(copied(source.stored))
            continue
        if kind.name not in wanted:
            errors = ErrorSums() if care.measure and kind.is_quantized else None
            weights = _importance(source, kind, importance)
            wanted[kind.name] = Encoding(kind, weights, care.best, errors)
        encodings.append(wanted[kind.name])
        payloads.append(None)
    made = iter(encoded(source.values, source.origin, encodings) if encodings else ())
    measured = [
        None if payload else wanted[choice.type.name].errors
        for payload, choice in zip(payloads, choices, strict=True)
    ]
    done = [payload or next(made) for payload in payloads]
    return [
        (
            PlannedTensor(
                source.name,
                source.shape,
                source.type.name,
                choice.type,
                payload.nbytes,
                choice.note,
                errors,
            ),
            payload,
        )
        for choice, payload, errors in zip(choices, done, measured, strict=True)
    ]


def _importance(
    source: SourceTensor, kind: GgmlType, matrix: ImportanceMatrix | None
) -> np.ndarray | None:
    if matrix is None or not kind.is_quantized:
        return None
    if source.origin == "token_embd.weight" and source.origin in matrix:
        values = matrix.entries[source.origin]
        if values.size != source.values.shape[-1]:
            return None  # an embedding has no input columns that could be measured
    return matrix.weights(source.origin, source.shape)


def _out(planned: PlannedTensor, payload: Payload) -> OutTensor:
    spec = TensorSpec(planned.name, planned.shape, planned.type.id, planned.nbytes)
    return OutTensor(spec, payload)
