"""What an architecture is: one frozen record, declared in one file and found by discovery.

A record says which Hugging Face classes it serves, which metadata keys come from which entries of
``config.json``, how each tensor is named on both sides, and how its tokenizers are read. The code
that acts on records is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..gguf.values import KeyValue
from ..tokenizers import TokenizerRule, Vocabulary

Config = Mapping[str, Any]
#: A default value of ``config.json``, or how to derive it from the other entries.
Default = Any | Callable[[Config], Any]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One tensor's two names; ``{n}`` is the layer. The suffix (``.weight``) is kept.

    Attributes:
        gguf: GGUF name without suffix.
        hf: Hugging Face name without suffix.
        shape: expected shape of the weight, each size a name of ``dimensions``; empty: any.
        transform: name of an invertible transform; empty: none.
        bias: ``no``, ``maybe`` or ``yes``: whether a ``.bias`` goes with it.
        optional: the tensor may be absent.
        keep_f32: stored as F32 whatever type is asked for.
    """

    gguf: str
    hf: str
    shape: tuple[str, ...] = ()
    transform: str = ""
    bias: str = "no"
    optional: bool = False
    keep_f32: bool = False


@dataclass(frozen=True, slots=True)
class ExtraTensor:
    """A tensor computed from the configuration; ``build`` returns None for "not in this model"."""

    gguf: str
    build: Callable[[Config], np.ndarray | None]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model family.

    Attributes:
        name: ``general.architecture``.
        classes: Hugging Face classes, as in ``architectures`` of ``config.json``.
        headless: those of ``classes`` whose tensors lack the ``model.`` prefix and the head.
        tensors: the tensor table.
        rope: ``norm`` (adjacent pairs) or ``neox`` (halves), fixed by llama.cpp.
        defaults: ``model_type`` to what the Hugging Face class assumes for absent entries.
        extra_keys: metadata after the common keys.
        extra_tensors: computed tensors, written first.
        tokenizer: which tokenizers it may have.
        adjust_vocabulary: last changes to the vocabulary, by configuration.
        notes: limits, for the list of architectures.
    """

    name: str
    classes: tuple[str, ...]
    tensors: tuple[TensorRule, ...]
    rope: str
    tokenizer: TokenizerRule
    headless: tuple[str, ...] = ()
    defaults: Mapping[str, Mapping[str, Default]] = field(default_factory=dict)
    extra_keys: Callable[[Config], list[KeyValue]] = lambda config: []
    extra_tensors: tuple[ExtraTensor, ...] = ()
    adjust_vocabulary: Callable[[Vocabulary, Config], Vocabulary] = lambda vocabulary, _: vocabulary
    notes: str = ""


def head_dim(config: Config) -> int:
    """Return the size of one attention head, given or derived."""
    given = config.get("head_dim")
    return int(given) if given else int(config["hidden_size"]) // int(config["num_attention_heads"])


def heads(config: Config) -> int:
    """Return the number of query heads: what key-value heads default to."""
    return int(config["num_attention_heads"])


def dimensions(config: Config) -> dict[str, int]:
    """Return the named sizes that tensor shapes are written in."""
    dim = head_dim(config)
    q_heads = heads(config)
    kv_heads = int(config.get("num_key_value_heads") or q_heads)
    return {
        "vocab": int(config["vocab_size"]),
        "hidden": int(config["hidden_size"]),
        "ff": int(config["intermediate_size"]),
        "heads": q_heads,
        "kv_heads": kv_heads,
        "head": dim,
        "q": q_heads * dim,
        "kv": kv_heads * dim,
    }
