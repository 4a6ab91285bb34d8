"""Recipes: which ggml type each tensor of a model gets for a target such as ``Q4_K_M``.

``targets`` lists what can be asked for, ``records`` the plain data that goes in and out, ``keep``
the tensors that stay as they are, ``rules`` the mixes as tables, and ``choose`` applies them. The
result equals llama-quantize's choice, tensor for tensor. Nothing here knows files or checkpoints.
"""

from __future__ import annotations

from .choose import choose, unmet_importance
from .records import (
    Choice,
    ModelFacts,
    RecipeOptions,
    TensorRecord,
    compile_pattern,
    parse_override,
)
from .targets import ALIASES, TARGETS, Target, parse_target

__all__ = [
    "ALIASES",
    "TARGETS",
    "Choice",
    "ModelFacts",
    "RecipeOptions",
    "Target",
    "TensorRecord",
    "choose",
    "compile_pattern",
    "parse_override",
    "parse_target",
    "unmet_importance",
]
