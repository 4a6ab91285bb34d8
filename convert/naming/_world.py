"""The common way of naming modules: a table per model type, and settings that become config.json.

A ``World`` states what is particular to one training code; ``naming`` makes the two directions of
it. The numbers come from the code's own settings where the checkpoint carries them, else from a
Hugging Face config.json that the user gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError, did_you_mean
from ...shardio.checkpoint import Checkpoint
from ._numbers import check_structure, experts_of, sizes_of
from .record import Model, Naming, Request
from .table import Rule, Table

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """One model type of a world.

    Attributes:
        architecture: as in config.json.
        rules: tensor names.
        warning: what a user should know about the translation, or empty.
    """

    architecture: str
    rules: tuple[Rule, ...]
    warning: str = ""


@dataclass(frozen=True, slots=True)
class World:
    """A training code.

    Attributes:
        name: as in ``Checkpoint.naming``.
        title: for people.
        variants: by Hugging Face model type, for a checkpoint (of this world or with HF names).
        settings: config.json entries (with ``model_type``) that the checkpoint's own settings give;
            empty where it carries none. Raises ConfigError.
        foreign: the code's own settings for a config.json.
        buffers: prefixes of names that Hugging Face has no place for.
        left_out: further such names, found by looking at the tensors.
        notes: warnings about the settings.
        rotary_pairs: whether q and k have rotary pairs in adjacent rows (for transforms that ask).
    """

    name: str
    title: str
    variants: Callable[[Checkpoint], Mapping[str, Variant]]
    settings: Callable[[Checkpoint], Settings]
    foreign: Callable[[Settings], Settings]
    buffers: tuple[str, ...] = ()
    left_out: Callable[[Checkpoint], tuple[str, ...]] = lambda ckpt: ()
    notes: Callable[[Checkpoint], tuple[str, ...]] = lambda ckpt: ()
    rotary_pairs: Callable[[Checkpoint], bool] = lambda ckpt: False

    @property
    def naming(self) -> Naming:
        """The record that makes it a naming of this folder."""
        return Naming(self.name, self.title, self._describe, self._plan)

    def _describe(self, ckpt: Checkpoint, request: Request) -> Model:
        derived = dict(self.settings(ckpt))
        if ckpt.config is not None and "model_type" in ckpt.config:
            check_structure(ckpt, derived)
            config = dict(ckpt.config)
        elif derived:
            config = derived
        else:
            raise ConfigError(
                f"{ckpt.path}: {self.title} names, but no settings: the number of heads is not in "
                "the tensors; give the Hugging Face config.json of the model with --config"
            )
        kind = request.model_type or config.get("model_type")
        variant = self._variant(ckpt, str(kind))
        config |= {"model_type": kind, "architectures": [variant.architecture]}
        table = Table(str(kind), variant.rules)
        tied = not any(n in ckpt.weights for n in _providers(variant, "head"))
        embedding = next(iter(_providers(variant, "embedding")))
        padded = _rows(ckpt, embedding)
        size = request.vocab_size or config.get("vocab_size") or padded
        if not isinstance(size, int) or size > padded:
            raise ConfigError(
                f"{ckpt.path}: the embedding has {padded} rows, fewer than the vocabulary size "
                f"{size}: the config or tokenizer belongs to another model"
            )
        config |= {"vocab_size": size, "tie_word_embeddings": tied}
        if config is not ckpt.config and "torch_dtype" not in config and derived:
            config["torch_dtype"] = ckpt.weights[embedding].dtype.name
        sizes = replace(
            sizes_of(config, tied, padded),
            experts=experts_of(config),
            rotary_interleaved=self.rotary_pairs(ckpt),
        )
        return Model(
            table,
            sizes,
            config,
            derived,
            left_out=(*self.buffers, *self.left_out(ckpt)),
            warnings=(*self.notes(ckpt), *filter(None, [variant.warning])),
        )

    def _plan(self, ckpt: Checkpoint, request: Request) -> Model:
        if ckpt.config is None:
            raise ConfigError(f"{ckpt.path}: has no config.json; give one with --config")
        config = dict(ckpt.config)
        kind = str(request.model_type or config.get("model_type"))
        variant = self._variant(ckpt, kind)
        tied = "lm_head.weight" not in ckpt.weights
        size = config.get("vocab_size")
        padded = request.padded_vocab_size or (size if isinstance(size, int) else 0)
        sizes = replace(sizes_of(config, tied, padded), experts=experts_of(config))
        return Model(Table(kind, variant.rules), sizes, config, dict(self.foreign(config)))

    def _variant(self, ckpt: Checkpoint, kind: str) -> Variant:
        known = self.variants(ckpt)
        if kind in known:
            return known[kind]
        raise ConfigError(
            f"{ckpt.path}: model type {kind!r} has no {self.title} naming"
            f"{did_you_mean(kind, known)}; known: {', '.join(known)}"
        )


def _providers(variant: Variant, need: str) -> list[str]:
    """Return the foreign names of the tensor that every model has one of."""
    return [r.left[0] for r in variant.rules if need in r.needs]


def _rows(ckpt: Checkpoint, name: str) -> int:
    if name not in ckpt.weights:
        raise ConfigError(f"{ckpt.path}: has no {name}: not a language model, or incomplete")
    return ckpt.weights[name].shape[0]


def rope_theta(config: Settings, default: float = 10000.0) -> float:
    """Return the rotary base of a config.json, old or new (``rope_parameters``)."""
    nested = config.get("rope_parameters")
    value = config.get("rope_theta")
    if value is None and isinstance(nested, Mapping):
        value = nested.get("rope_theta")
    return float(value) if isinstance(value, int | float) else default
