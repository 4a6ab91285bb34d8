"""The plain data of a recipe: a model's facts and tensors go in, one choice per tensor comes out.

Shapes are row-major, so the last number is the row length that blocks are cut from. Leading dims
of size one do not count (ggml drops them), which is what makes a [1, n] matrix a vector here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import QuantError
from ..types import GgmlType, type_by_name

_SEVENTY_B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as the recipes see it.

    Attributes:
        name: its GGUF name.
        shape: row-major.
        type: what it is stored as now.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape without leading ones (at least one dim)."""
        shape = self.shape
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        return shape

    @property
    def cols(self) -> int:
        """Row length."""
        return self.shape[-1] if self.shape else 1

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of matrices (experts)."""
        dims = self.dims
        return len(dims) > 2 and dims[-3] > 1

    @property
    def layer(self) -> int | None:
        """The layer number in the name, if it has one."""
        match = re.match(r"blk\.(\d+)", self.name)
        return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules ask about a model.

    Attributes:
        architecture: ``general.architecture``.
        layers: number of layers, prediction (nextn) layers included.
        nextn_layers: how many of them are prediction layers.
        heads, kv_heads: attention heads of the first layer.
        experts: number of experts, 0 for a dense model.
    """

    architecture: str
    layers: int
    heads: int = 0
    kv_heads: int = 0
    experts: int = 0
    nextn_layers: int = 0

    @property
    def gqa(self) -> int:
        """Query heads per key/value head, 0 when the first layer has no attention."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether the model is one of those that llama.cpp calls 70B."""
        if _SEVENTY_B.get(self.architecture) != self.layers - self.nextn_layers:
            return False
        if self.architecture != "llama":
            return True
        return self.heads != self.kv_heads and self.experts != 8


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """What a user may change about a recipe.

    Attributes:
        tensor_types: (regex, type name) pairs, the first whose regex is found in a name counts.
        output_type: type of ``output.weight`` (and of a tied embedding).
        embedding_type: type of the token embeddings.
        pure: the base type everywhere, no mix.
        leave_output: keep ``output.weight`` as it is.
        has_importance: an importance matrix is at hand (some mixes depend on it).
    """

    tensor_types: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    leave_output: bool = False
    has_importance: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of a tensor.

    Attributes:
        name: the tensor.
        type: its type in the output.
        note: why it is not the mix's own choice, or empty.
    """

    name: str
    type: GgmlType
    note: str = ""


def parse_override(text: str) -> tuple[str, str]:
    """Split ``REGEX=TYPE`` and check both halves.

    Raises:
        QuantError: no ``=``, a bad regular expression, or an unknown type.
    """
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern or not kind:
        raise QuantError(f"{text!r} is not of the form REGEX=TYPE, such as attn_v=q8_0")
    compile_pattern(pattern)
    return pattern, storable_type(kind).name


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a tensor-name pattern; case does not matter.

    Raises:
        QuantError: it is not a regular expression.
    """
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise QuantError(f"{pattern!r} is not a regular expression: {error}") from error


def storable_type(name: str) -> GgmlType:
    """Return the type called ``name``, if weights can be stored in it.

    Raises:
        QuantError: unknown, an integer type, or an activation format.
    """
    kind = type_by_name(name)
    if kind.kind == "int" or not kind.storable or kind.name == "F64":
        raise QuantError(f"{kind.name} is not a type that weights are quantized to")
    return kind
