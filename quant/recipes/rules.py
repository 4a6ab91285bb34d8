"""The mixes as tables: per kind of tensor, the first rule that fits a target gives the type.

A rule reads: for these targets, where this holds, that type; when no rule fits, the target's base
type stays. The tables state the behaviour of llama.cpp's quantizer. They were tuned by its authors
on Llama, Mixtral 8x7B and Falcon, which is where "eight experts" and "falcon" come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from .records import ModelFacts
from .targets import TARGETS


class Kind(Enum):
    """Roles that the rules tell apart."""

    OUTPUT = auto()
    EMBEDDING = auto()
    VALUE = auto()  # attn_v, and the fused tensors that contain it
    KEY = auto()
    QUERY = auto()
    ATTENTION_OUT = auto()
    UP = auto()
    GATE = auto()
    DOWN = auto()
    OTHER = auto()


EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

_BY_FRAGMENT = (
    ("attn_qkv.weight", Kind.VALUE),
    ("attn_kv_b.weight", Kind.VALUE),
    ("attn_v.weight", Kind.VALUE),
    ("attn_k.weight", Kind.KEY),
    ("attn_q.weight", Kind.QUERY),
    ("attn_output.weight", Kind.ATTENTION_OUT),
    ("ffn_up", Kind.UP),
    ("ffn_gate", Kind.GATE),
    ("ffn_down", Kind.DOWN),
)


def kind_of(name: str) -> Kind:
    """Return the role of a tensor by its GGUF name."""
    if name == "output.weight":
        return Kind.OUTPUT
    if name in EMBEDDINGS:
        return Kind.EMBEDDING
    return next((kind for part, kind in _BY_FRAGMENT if part in name), Kind.OTHER)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the model a rule is asked.

    Attributes:
        model: the model's facts.
        has_importance: an importance matrix is at hand.
        seen: tensors of this kind that the mix has decided before.
        index: the layer number in models with experts, else ``seen``.
        count: what ``index`` runs to.
        odd_row: the row length is no multiple of the base type's block.
    """

    model: ModelFacts
    has_importance: bool
    seen: int = 0
    index: int = 0
    count: int = 0
    odd_row: bool = False


Condition = Callable[[Place], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """For ``targets``, where ``when`` holds: ``type``."""

    targets: frozenset[str]
    type: str
    when: Condition


def _rule(targets: str, type: str, *when: Condition) -> Rule:
    return Rule(frozenset(targets.split()), type, lambda p: all(test(p) for test in when))


def _first(n: int) -> Condition:
    return lambda p: p.seen < n


def _before(fraction: int) -> Condition:
    """In the first 1/fraction of the layers."""
    return lambda p: p.index < p.count // fraction


def _seen_before(fraction: int) -> Condition:
    """Among the first (layers / fraction) tensors of the kind, which in MoE models comes sooner."""
    return lambda p: p.seen < p.count // fraction


def _middle(p: Place) -> bool:
    return p.count // 8 <= p.index < 7 * p.count // 8


def _more(p: Place) -> bool:
    """The first and last eighth of the layers, and every third one between."""
    eighth = p.count // 8
    return p.index < eighth or p.index >= 7 * p.count // 8 or (p.index - eighth) % 3 == 2


def _grouped(p: Place) -> bool:
    return p.model.gqa >= 4


def _grouped_or_experts(p: Place) -> bool:
    return p.model.gqa >= 4 or p.model.experts >= 4


def _eight(p: Place) -> bool:
    return p.model.experts == 8


def _falcon(p: Place) -> bool:
    return p.model.architecture == "falcon"


def _not_falcon(p: Place) -> bool:
    return not _falcon(p)


def _blind(p: Place) -> bool:
    return not p.has_importance


def _guided(p: Place) -> bool:
    return p.has_importance


_ALL = " ".join(TARGETS)
_LOW = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
LOW = frozenset(_LOW.split())
_NOT_LOW = " ".join(name for name in TARGETS if name not in LOW)

OUTPUT = (
    _rule("MXFP4_MOE", "Q8_0"),
    _rule(_ALL, "Q8_0", _falcon),
    _rule(_ALL, "Q8_0", lambda p: p.odd_row),
    _rule(f"{_LOW} IQ3_XXS", "Q5_K"),
    _rule("Q8_0", "Q8_0"),
    _rule(_ALL, "Q6_K"),
)

RULES: dict[Kind, tuple[Rule, ...]] = {
    Kind.OUTPUT: OUTPUT,
    Kind.EMBEDDING: (
        _rule("IQ2_XXS IQ2_XS IQ1_S IQ1_M", "Q2_K"),
        _rule("IQ2_S IQ2_M IQ3_XXS", "IQ3_S"),
        _rule("TQ1_0 TQ2_0 Q2_0", "Q4_K"),
    ),
    Kind.VALUE: (
        _rule(_NOT_LOW, "Q8_0", _eight),
        _rule(_LOW, "Q4_K", _grouped_or_experts),
        _rule("IQ2_S IQ2_M", "IQ3_S"),
        _rule(_LOW, "Q2_K"),
        _rule("Q2_K", "Q4_K", _grouped),
        _rule("Q2_K", "Q3_K"),
        _rule("Q2_K_S", "Q4_K", _grouped),
        _rule("IQ3_XXS", "Q4_K", _grouped),
        _rule("IQ3_XXS", "IQ3_S", _blind),
        _rule("IQ3_XS IQ3_S", "Q4_K", _grouped),
        _rule("IQ3_M", "Q4_K"),
        _rule("Q3_K_M", "Q5_K", _first(2)),
        _rule("Q3_K_M", "Q4_K"),
        _rule("Q3_K_L", "Q5_K"),
        _rule("IQ4_NL IQ4_XS", "Q5_K", _grouped),
        _rule("Q4_K_M Q5_K_M", "Q6_K", _more),
        _rule("Q4_K_S", "Q5_K", _first(4)),
    ),
    Kind.KEY: (
        _rule(_LOW, "Q4_K", _eight),
        _rule(_NOT_LOW, "Q8_0", _eight),
        _rule("IQ3_XS", "IQ3_XXS"),
        _rule("IQ3_XXS", "IQ2_S"),
    ),
    Kind.QUERY: (
        _rule("IQ3_XS", "IQ3_XXS"),
        _rule("IQ3_XXS", "IQ2_S"),
    ),
    Kind.ATTENTION_OUT: (
        _rule("Q3_K_L", "Q4_K", _falcon),
        _rule(_NOT_LOW, "", _falcon),
        _rule(
            f"{_LOW} Q2_K IQ3_XS IQ3_XXS Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M IQ3_S IQ3_M IQ4_XS",
            "Q5_K",
            _eight,
        ),
        _rule(_NOT_LOW, "", _eight),
        _rule("IQ1_S IQ1_M", "IQ2_XXS"),
        _rule("IQ2_S IQ2_M IQ3_XXS", "IQ3_S"),
        _rule("Q2_K", "Q3_K"),
        _rule("Q3_K_M IQ3_M", "Q4_K"),
        _rule("Q3_K_L", "Q5_K"),
    ),
    Kind.DOWN: (
        _rule("IQ2_S IQ2_M", "IQ3_S", _seen_before(8)),
        _rule(_LOW, "Q2_K", _seen_before(8)),
        _rule("Q2_K", "Q3_K"),
        _rule("Q2_K_S", "Q4_K", _before(8)),
        _rule("IQ3_XXS", "Q4_K", _blind, _before(8)),
        _rule("IQ3_XXS", "Q3_K", _blind),
        _rule("Q3_K_M", "Q5_K", _before(16)),
        _rule("Q3_K_M", "Q4_K", _not_falcon),
        _rule("Q3_K_M", "Q4_K", _more),
        _rule("IQ3_M", "Q4_K", _before(8)),
        _rule("IQ3_M", "Q4_K", _eight, _more),
        _rule("Q3_K_L", "Q4_K", _falcon),
        _rule("Q3_K_L", "Q5_K"),
        _rule("Q4_K_M", "Q6_K", _falcon, _before(16)),
        _rule("Q4_K_M", "Q5_K", _falcon, _more),
        _rule("Q4_K_M", "Q6_K", _not_falcon, _more),
        _rule("IQ4_NL IQ4_XS", "Q5_K", _blind, _before(8)),
        _rule("Q5_K_M", "Q6_K", _more),
        _rule("Q4_K_S", "Q5_K", _not_falcon, _before(8)),
        # even with importance, one-scale blocks go astray in the first layers
        _rule("Q4_0", "Q4_1", _guided, _before(8)),
        _rule("Q5_0", "Q5_1", _guided, _before(8)),
    ),
    Kind.UP: (_rule("IQ3_XS", "IQ3_XXS", _middle),),
    Kind.GATE: (_rule("IQ3_XS", "IQ3_XXS", _middle),),
    Kind.OTHER: (),
}

#: Where eight heads share a value matrix it is small, and better bits for it are nearly free.
VALUE_OF_70B = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}

#: A type for rows that the wanted one does not divide. llama-quantize has no entry for the last
#: two and gives up there.
ODD_ROWS = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
    "Q2_0": "Q4_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "Q1_0": "Q4_0", "NVFP4": "Q4_0",
}  # fmt: skip

#: glm5-next keeps these at Q8_0 or better.
AT_LEAST_Q8 = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}


def pick(kind: Kind, target: str, place: Place) -> str | None:
    """Return the type of the first rule that fits, or None for the base type."""
    for rule in RULES[kind]:
        if target in rule.targets and rule.when(place):
            return rule.type or None
    return None
