"""Plan a GGUF file: which type each tensor gets, where it goes, and how its bytes are made.

For F32, F16, BF16 and Q8_0 the rules are those of llama.cpp's converter: vectors, norms and what
is not a ``.weight`` stay F32, a row that does not fill blocks falls back to F16, all else gets the
type asked for. Any other type is a mix: the recipes choose, as if a 16-bit file were quantized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import ml_dtypes
import numpy as np

from ..errors import ConfigError, QuantError, did_you_mean
from ..quant import ErrorSums, GgmlType, quantize, type_by_name
from ..quant.recipes import ALIASES, TARGETS, ModelFacts, RecipeOptions, Target, parse_target
from ..shardio.payload import EncodedPayload, Payload, TensorPayload
from ..shardio.tensor import LazyTensor
from .architectures import MappedTensor
from .gguf import TensorSpec
from .gguf.files import OutTensor
from .gguf.tensors import BlockTensor
from .imatrix import ImportanceMatrix
from .kept import Keep, Kept, keeping, stored_anyway
from .quant_plan import (
    ORDINARY,
    Care,
    SourceTensor,
    TargetPlan,
    plan_targets,
    plan_warnings,
    require_importance,
)

#: Output types that need no recipe, with their ``general.file_type``.
FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}

_FLOAT32 = np.dtype(np.float32)
_FLOAT16 = np.dtype(np.float16)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PLAIN: Mapping[str, np.dtype] = {"F32": _FLOAT32, "F16": _FLOAT16, "BF16": _BFLOAT16}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output: ``source`` is its Hugging Face name, ``shape`` row-major.

    ``errors`` are filled while the tensor is written, where they were asked for.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: GgmlType
    nbytes: int
    tensor: LazyTensor
    errors: ErrorSums | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """One planned output: its type's name, what to write, and the mix, if it is one.

    ``mapped`` are the tensors it is made of; ``kept`` says what became of quantized weights.
    """

    type: str
    tensors: list[PlannedTensor]
    out: list[OutTensor]
    mix: TargetPlan | None = None
    warnings: tuple[str, ...] = ()
    mapped: Sequence[MappedTensor] = ()
    kept: Kept | None = None


def parse_types(text: str, tensors: Sequence[MappedTensor]) -> list[GgmlType | Target | Keep]:
    """Return the types asked for, separated by commas; ``auto`` is that of the weights.

    ``keep`` keeps the bits of quantized weights; the others get the type of ``auto``.

    Raises:
        ConfigError: not a type this writes.
    """
    names = list(dict.fromkeys(name.strip().upper() for name in text.split(",")))
    return [_parse_type(name, tensors) for name in names]


def _parse_type(name: str, tensors: Sequence[MappedTensor]) -> GgmlType | Target | Keep:
    if name == "AUTO":
        return native_type(tensors)
    if name == Keep.KEEP.name:
        return Keep.KEEP
    if name in FILE_TYPES:
        return type_by_name(name)
    found = TARGETS.get(ALIASES.get(name, name))
    if found is None or found.copies:
        known = [
            *FILE_TYPES,
            "AUTO",
            "KEEP",
            *(t for t in (*TARGETS, *ALIASES) if t not in FILE_TYPES),
        ]
        known.remove("COPY")
        raise ConfigError(
            f"unknown output type {name.lower()!r}{did_you_mean(name, known).lower()}; "
            f"types: {', '.join(known).lower()}"
        )
    return found


def native_type(tensors: Sequence[MappedTensor]) -> GgmlType:
    """Return the 16-bit type of the weights, F16 when they have none."""
    for mapped in tensors:
        if mapped.tensor.ndim >= 2 and mapped.tensor.dtype in (_BFLOAT16, _FLOAT16):
            return type_by_name("BF16" if mapped.tensor.dtype == _BFLOAT16 else "F16")
    return type_by_name("F16")


def plan_outputs(
    mapped: Sequence[MappedTensor],
    types: Sequence[GgmlType | Target | Keep],
    facts: ModelFacts,
    recipe: RecipeOptions,
    matrix: ImportanceMatrix | None,
    care: Care = ORDINARY,
) -> list[Output]:
    """Plan one output per type.

    Args:
        mapped: the model's tensors.
        types: plain types, or mixes; a mix is also made of a plain type when another option
            changes what it means.
        facts: what the recipes ask about the model.
        recipe: changes to the mixes.
        matrix: measured importance.
        care: least error, and its report.

    Raises:
        QuantError: a mix needs an importance matrix, or an option does not fit a tensor.
    """
    changed = recipe != RecipeOptions() or matrix is not None
    wanted = [
        parse_target(t.name)
        if (changed and not isinstance(t, Keep))
        or (care != ORDINARY and isinstance(t, GgmlType) and t.is_quantized)
        else t
        for t in types
    ]
    native = native_type(mapped)
    anyway = stored_anyway(mapped)
    sources = [
        SourceTensor(m.name, m.name, _choose(m, native), m.tensor, _blocks(m)) for m in mapped
    ]
    mixes = [t for t in wanted if isinstance(t, Target)]
    planned: list[TargetPlan] = []
    if mixes:
        recipe = _keeping_blocks(recipe, mapped)
        planned = plan_targets(sources, mixes, facts, recipe, matrix, care=care)
    plans = iter(planned)
    outputs = []
    for kind in wanted:
        if isinstance(kind, Keep):
            own, kept = keeping(mapped)
            [made] = plan_outputs(own, [native], facts, recipe, matrix, care)
            outputs.append(replace(made, type=kind.name, kept=kept))
        elif isinstance(kind, Target):
            plan = next(plans)
            made = _mixed(plan, mapped, plan_warnings([plan], sources, matrix))
            outputs.append(replace(made, mapped=mapped, kept=anyway))
        else:
            outputs.append(replace(_plain(mapped, kind), mapped=mapped, kept=anyway))
    return outputs


def _keeping_blocks(recipe: RecipeOptions, mapped: Sequence[MappedTensor]) -> RecipeOptions:
    """Return the recipe with tensors that come in blocks left as they are, unless it says more."""
    kept = [(f"^{re.escape(m.name)}$", m.stored.kind.name) for m in mapped if m.stored is not None]
    return replace(recipe, tensor_types=(*recipe.tensor_types, *kept))


def _plain(mapped: Sequence[MappedTensor], kind: GgmlType) -> Output:
    tensors = plan_tensors(mapped, kind)
    return Output(kind.name, tensors, [OutTensor(_spec(t), payload(t)) for t in tensors])


def _mixed(plan: TargetPlan, mapped: Sequence[MappedTensor], warnings: tuple[str, ...]) -> Output:
    require_importance(plan)
    by_name = {m.name: m for m in mapped}
    tensors = [
        PlannedTensor(
            t.name, by_name[t.name].hf, t.shape, t.type, t.nbytes, by_name[t.name].tensor, t.errors
        )
        for t in plan.tensors
    ]
    return Output(plan.target.name, tensors, list(plan.out), plan, warnings)


def _spec(t: PlannedTensor) -> TensorSpec:
    return TensorSpec(t.name, t.shape, t.type.id, t.nbytes)


def plan_tensors(mapped: Sequence[MappedTensor], target: GgmlType) -> list[PlannedTensor]:
    """Choose the type of every tensor."""
    return [_planned(one, _choose(one, target)) for one in mapped]


def _planned(one: MappedTensor, kind: GgmlType) -> PlannedTensor:
    shape = one.tensor.shape
    nbytes = prod(shape[:-1]) * kind.row_bytes(shape[-1])
    return PlannedTensor(one.name, one.hf, shape, kind, nbytes, one.tensor)


def _blocks(one: MappedTensor) -> LazyTensor | None:
    return one.stored.blocks if one.stored is not None else None


def _choose(one: MappedTensor, target: GgmlType) -> GgmlType:
    if one.stored is not None:
        return one.stored.kind
    flat = one.tensor.ndim <= 1 or one.name.endswith("_norm.weight")
    if flat or one.keep_f32 or not one.name.endswith(".weight"):
        return type_by_name("F32")
    if one.tensor.shape[-1] % target.block:
        return type_by_name("F16")
    return target


def payload(planned: PlannedTensor) -> Payload:
    """Return the bytes of a tensor: copied where nothing changes, else encoded row by row."""
    tensor = planned.tensor
    if isinstance(tensor, BlockTensor):
        return TensorPayload(tensor.blocks)
    if tensor.dtype == _PLAIN.get(planned.type.name):
        return TensorPayload(tensor)
    if tensor.dtype not in _PLAIN.values():
        tensor = tensor.cast(_FLOAT32)
    return EncodedPayload(tensor, _encoder(planned), planned.type.row_bytes(planned.shape[-1]))


def _encoder(planned: PlannedTensor) -> Callable[[np.ndarray], np.ndarray]:
    def encode(rows: np.ndarray) -> np.ndarray:
        try:
            return quantize(rows, planned.type, threads=1)
        except QuantError as error:
            raise QuantError(f"tensor {planned.source!r} as {planned.name!r}: {error}") from error

    return encode
