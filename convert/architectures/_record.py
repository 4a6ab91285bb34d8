"""What an architecture is: one frozen record, declared in one file and found by discovery.

A record says which Hugging Face classes it serves, which metadata keys come from which entries of
``config.json``, how each tensor is named on both sides, and how its tokenizers are read. The code
that acts on records is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError
from ..gguf.values import KeyValue
from ..tokenizers import TokenizerRule, Vocabulary

if TYPE_CHECKING:
    from ._restore import Stored

Config = Mapping[str, Any]
#: A default value of ``config.json``, or how to derive it from the other entries.
Default = Any | Callable[[Config], Any]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One line of a tensor table: which Hugging Face tensors become which GGUF tensors.

    ``{n}`` in a name is the layer. ``{e}``, ``{h}``, ``{k}`` or ``{a}`` in the Hugging Face name
    stand for every expert, query head, key-value head or other; those tensors are stacked. ``{q}``
    stands for the blocks and scales of MXFP4, ``{m}`` for the number of a prediction layer. Several
    rules for one GGUF tensor are alternatives: the one whose tensors are there is taken, the first
    is what a model should have.

    Attributes:
        gguf: GGUF name without suffix; several when a fused tensor is cut.
        hf: Hugging Face name without suffix.
        shape: expected shape of each Hugging Face tensor, each size a name of ``dimensions``;
            empty: any.
        transform: name of an invertible transform; empty: none.
        bias: ``no``, ``maybe`` or ``yes``: whether a ``.bias`` goes with it.
        optional: the tensor may be absent.
        keep_f32: stored as F32 whatever type is asked for.
        exact: the names are whole, no ``.weight`` follows.
        layers: only in layers with all of these tags: ``dense`` or ``moe``, ``main`` or ``mtp``
            (multi-token prediction), and those of ``Architecture.layer_tags``.
        needs: entry of ``config.json`` that must be set (with a ``!`` before it: must not be).
    """

    gguf: str | tuple[str, ...]
    hf: str
    shape: tuple[str, ...] = ()
    transform: str = ""
    bias: str = "no"
    optional: bool = False
    keep_f32: bool = False
    exact: bool = False
    layers: str = ""
    needs: str = ""

    def applies(self, config: Config) -> bool:
        """Return whether a model with this configuration may have the tensor."""
        unset = self.needs.startswith("!")
        return not self.needs or bool(config.get(self.needs.lstrip("!"))) != unset

    @property
    def outputs(self) -> tuple[str, ...]:
        """GGUF names without suffix."""
        return (self.gguf,) if isinstance(self.gguf, str) else self.gguf


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
        headless: those of ``classes`` whose tensors lack a prefix (and the head).
        prefix: that prefix.
        composite: those of ``classes`` that wrap the text model together with others, of which
            only the text model is converted.
        tensors: the tensor table.
        rope: ``norm`` (adjacent pairs) or ``neox`` (halves), fixed by llama.cpp; empty: none.
        defaults: ``model_type`` to what the Hugging Face class assumes for absent entries.
        synonyms: entry of ``config.json`` to what other families call it.
        sizes: more names for shapes, or others than usual.
        moe_layer: whether a layer has experts (by number); rules of ``layers`` ask.
        layer_tags: more tags of a layer (by number).
        prediction_layers: how many layers of multi-token prediction the tensor names show; they
            follow the others.
        attention: the model has attention heads.
        ignored: regular expression of tensor names that GGUF has no place for.
        drop_extra_layers: tensors of layers beyond the last (multi-token prediction) are left out.
        quantized: quantization methods of checkpoints that are taken as they are.
        drop_tied_head: a head that is stored although it is tied is left out.
        extra_keys: metadata after the common keys, or in place of one of them.
        key_order: when not empty, exactly these keys (without the family's prefix) are written, in
            this order.
        first_keys: metadata right after ``general.architecture``.
        extra_tensors: computed tensors, written first.
        tokenizer: which tokenizers it may have.
        adjust_vocabulary: last changes to the vocabulary, by configuration.
        adjust_entries: last changes to the metadata entries of the vocabulary.
        restore: entries of ``config.json`` that only this family has, from a stored model (``...``:
            leave out what all families have); None: GGUF files are not brought back.
        notes: limits, for the list of architectures.
    """

    name: str
    classes: tuple[str, ...]
    tensors: tuple[TensorRule, ...]
    rope: str
    tokenizer: TokenizerRule
    headless: tuple[str, ...] = ()
    prefix: str = "model."
    composite: tuple[str, ...] = ()
    defaults: Mapping[str, Mapping[str, Default]] = field(default_factory=dict)
    synonyms: Mapping[str, str] = field(default_factory=dict)
    sizes: Callable[[Config], Mapping[str, int]] = lambda config: {}
    moe_layer: Callable[[Config, int], bool] = lambda config, layer: False
    layer_tags: Callable[[Config, int], tuple[str, ...]] = lambda config, layer: ()
    prediction_layers: Callable[[Config, Collection[str]], int] = lambda config, names: 0
    attention: bool = True
    ignored: str = ""
    drop_extra_layers: bool = False
    drop_tied_head: bool = False
    quantized: tuple[str, ...] = ()
    extra_keys: Callable[[Config], list[KeyValue]] = lambda config: []
    key_order: tuple[str, ...] = ()
    first_keys: Callable[[Config], list[KeyValue]] = lambda config: []
    extra_tensors: tuple[ExtraTensor, ...] = ()
    adjust_vocabulary: Callable[[Vocabulary, Config], Vocabulary] = lambda vocabulary, _: vocabulary
    adjust_entries: Callable[[Sequence[KeyValue]], list[KeyValue]] = list
    restore: Callable[[Stored], Mapping[str, Any]] | None = None
    notes: str = ""


_WIDEST_HEAD = 1 << 16  # before frequencies are computed for it


def head_dim(config: Config) -> int:
    """Return the size of one attention head, given or derived."""
    given = config.get("head_dim")
    derived = int(config["hidden_size"]) // int(config["num_attention_heads"])
    dim = derived if given is None else _whole("head_dim", given) or derived
    if dim > _WIDEST_HEAD:
        raise ConfigError(f"config.json: one attention head would have {dim} numbers")
    return dim


def heads(config: Config) -> int:
    """Return the number of query heads: what key-value heads default to."""
    return int(config["num_attention_heads"])


#: Names in shapes to the configuration entries they come from; only those given are there.
_SIZES = {
    "ff": ("intermediate_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "moe_ff": ("moe_intermediate_size",),
    "shared_ff": ("shared_expert_intermediate_size",),
}


def dimensions(architecture: Architecture, config: Config) -> dict[str, int]:
    """Return the named sizes that tensor shapes are written in."""
    sizes = {"vocab": int(config["vocab_size"]), "hidden": int(config["hidden_size"])}
    if architecture.attention:
        dim = head_dim(config)
        q_heads = heads(config)
        kv_heads = _whole("num_key_value_heads", config.get("num_key_value_heads") or q_heads)
        sizes |= {
            "heads": q_heads,
            "kv_heads": kv_heads,
            "head": dim,
            "q": q_heads * dim,
            "kv": kv_heads * dim,
            "qkv": (q_heads + 2 * kv_heads) * dim,
        }
    own = architecture.sizes(config)
    for name, keys in _SIZES.items():
        found = next((key for key in keys if config.get(key) is not None), None)
        if found is not None and name not in own:
            sizes[name] = _whole(found, config[found])
            sizes[f"2{name}"] = 2 * sizes[name]
    return {**sizes, **own}


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"config.json: {key} is {value!r}, a whole number is needed")
    return value
