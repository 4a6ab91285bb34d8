"""Apply a recipe: one type per tensor, in the order in which llama-quantize decides.

The order matters, because some rules count the tensors before: by layer (tensors outside the
layers first), then by name. Source of the behaviour: llama.cpp's quantizer; the tests hold it to
that program's own snapshots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ...errors import QuantError
from ..types import GgmlType, type_by_name
from .keep import is_kept
from .records import (
    Choice,
    ModelFacts,
    RecipeOptions,
    TensorRecord,
    compile_pattern,
    storable_type,
)
from .rules import AT_LEAST_Q8, EMBEDDINGS, LOW, ODD_ROWS, VALUE_OF_70B, Kind, Place, kind_of, pick
from .targets import Target

#: Types whose blocks are noise without importance, in any file; more so the last in a Q2_K_S file.
_BLIND_IS_GARBAGE = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}


def choose(
    tensors: Sequence[TensorRecord],
    target: Target,
    model: ModelFacts,
    options: RecipeOptions | None = None,
) -> list[Choice]:
    """Choose a type for every tensor of a model.

    Args:
        tensors: all tensors, in any order.
        target: the mix.
        model: facts about the model (before any pruning).
        options: overrides.

    Returns:
        One choice per tensor, in file order: by layer, then by name.

    Raises:
        QuantError: an override names an unknown type, or one that the tensor's rows do not fit.
    """
    ordered = sorted(tensors, key=file_order)
    recipe = _Recipe(ordered, target, model, options or RecipeOptions())
    return [recipe.decide(tensor) for tensor in ordered]


def file_order(tensor: TensorRecord) -> tuple[int, bytes]:
    """Sort key of the order in which tensors are decided and stored."""
    layer = tensor.layer
    return -1 if layer is None else layer, tensor.name.encode()


def unmet_importance(
    choices: Iterable[Choice], target: Target, has: Callable[[str], bool]
) -> list[Choice]:
    """Return the choices that would be garbage without importance, and have none.

    Args:
        choices: tensors that are to be encoded.
        target: the mix they come from.
        has: whether the importance matrix has an entry for a tensor name.
    """
    return [c for c in choices if needs_importance(c.name, c.type, target) and not has(c.name)]


def needs_importance(name: str, kind: GgmlType, target: Target) -> bool:
    """Return whether a tensor must not be encoded as ``kind`` without importance."""
    if kind.needs_importance:
        return True
    if name in EMBEDDINGS or name == "output.weight":  # no matrix covers these
        return False
    return kind.name in _BLIND_IS_GARBAGE or (kind.name == "Q2_K" and target.name == "Q2_K_S")


class _Recipe:
    """One pass over a model's tensors, with the counts that rules look at."""

    def __init__(
        self,
        tensors: Sequence[TensorRecord],
        target: Target,
        model: ModelFacts,
        options: RecipeOptions,
    ) -> None:
        self.target, self.model, self.options = target, model, options
        self.base = None if target.copies else target.base
        self.patterns = [(compile_pattern(p), storable_type(t)) for p, t in options.tensor_types]
        self.output = storable_type(options.output_type) if options.output_type else None
        self.embedding = storable_type(options.embedding_type) if options.embedding_type else None
        kinds = Counter(kind_of(t.name) for t in tensors)
        self.tied = not kinds[Kind.OUTPUT]
        self.values = kinds[Kind.VALUE]
        self.seen: Counter[Kind] = Counter()

    def decide(self, tensor: TensorRecord) -> Choice:
        """Choose the type of the next tensor."""
        if self.base is None or is_kept(tensor, self.model.architecture, self.options):
            return Choice(tensor.name, tensor.type)
        kind = kind_of(tensor.name)
        named = next((t for p, t in self.patterns if p.search(tensor.name)), None)
        per_layer = tensor.name == EMBEDDINGS[1]
        if self.embedding and kind is Kind.EMBEDDING and not (per_layer and named):
            return _fixed(tensor, self.embedding, "--token-embedding-type")
        if self.output and kind is Kind.OUTPUT:
            return _fixed(tensor, self.output, "--output-tensor-type")
        note = ""
        if named is not None:
            chosen, note = named, "--tensor-type"
        elif self.options.pure or not self.base.is_quantized:
            chosen = self.base
        else:
            chosen = self._mixed(tensor, kind, self.base)
        return _fitted(tensor, chosen, note)

    def _mixed(self, tensor: TensorRecord, kind: Kind, base: GgmlType) -> GgmlType:
        """The mix's own choice, before row lengths are looked at."""
        pinned = AT_LEAST_Q8.get(self.model.architecture, ())
        if any(part in tensor.name for part in pinned):
            return type_by_name("Q8_0")
        if self.tied and kind is Kind.EMBEDDING:
            if self.output:
                return self.output
            kind = Kind.OUTPUT
        if self.target.name == "MXFP4_MOE" and kind is not Kind.OUTPUT:
            return type_by_name("MXFP4" if self._holds_experts(tensor, kind) else "Q8_0")
        place = self._place(tensor, kind, base)
        found = pick(kind, self.target.name, place) or base.name
        if kind is Kind.VALUE and self.model.is_70b and self.target.name not in LOW:
            found = VALUE_OF_70B.get(found, found)
        self.seen[kind] += 1
        return type_by_name(found)

    def _place(self, tensor: TensorRecord, kind: Kind, base: GgmlType) -> Place:
        seen = self.seen[kind]
        layer = tensor.layer
        by_name = kind in (Kind.DOWN, Kind.UP, Kind.GATE) and self.model.experts > 1
        return Place(
            self.model,
            self.options.has_importance,
            seen=seen,
            index=layer if by_name and layer is not None else seen,
            count=self.values if kind is Kind.VALUE else self.model.layers,
            odd_row=tensor.cols % base.block != 0,
        )

    def _holds_experts(self, tensor: TensorRecord, kind: Kind) -> bool:
        """MXFP4 goes to stacks; one architecture also stacks attention heads."""
        if not tensor.is_stack:
            return False
        return self.model.architecture != "bailingmoe3" or kind in (Kind.UP, Kind.GATE, Kind.DOWN)


def _fixed(tensor: TensorRecord, wanted: GgmlType, option: str) -> Choice:
    if tensor.cols % wanted.block:
        raise QuantError(
            f"tensor {tensor.name!r} has rows of {tensor.cols}, which {wanted.name} cannot cut "
            f"into blocks of {wanted.block}: choose another type for {option}"
        )
    return Choice(tensor.name, wanted, option)


def _fitted(tensor: TensorRecord, wanted: GgmlType, note: str) -> Choice:
    """Replace a type whose blocks do not divide the rows."""
    if tensor.cols % wanted.block == 0:
        return Choice(tensor.name, wanted, note)
    found = type_by_name(ODD_ROWS.get(wanted.name, wanted.name))
    if tensor.cols % found.block:
        found = type_by_name("F16")
    why = f"rows of {tensor.cols} do not fit {wanted.name}"
    return Choice(tensor.name, found, f"{note}, {why}" if note else why)
