"""DeepSpeed pipelines of Hugging Face layers: embedding, decoder layers, norm and head by number.

Which layer is which was told by the reader (``args["hf_names"]``); the model's type and numbers
come from a config.json. Source: DeepSpeed ``runtime/pipe/module.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from . import megatron_deepspeed
from ._numbers import check_structure, sizes_of
from .record import Model, Naming, Request
from .table import Rule, Table, rule

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NORM, _TIED_EMBEDDING = "model.norm.weight", "tied_modules.embed"
_BLOCK = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def _describe(ckpt: Checkpoint, request: Request) -> Model:
    names = ckpt.args.get("hf_names")
    if not isinstance(names, Mapping):
        if megatron_deepspeed.is_megatron_deepspeed(ckpt):
            return megatron_deepspeed.NAMING.describe(ckpt, request)
        raise ConfigError(
            f"{ckpt.path}: the layers of this pipeline have names of no known model "
            f"({', '.join(list(ckpt.weights)[:3])}...): mconv can merge it, but not name it"
        )
    if ckpt.config is None:
        raise ConfigError(
            f"{ckpt.path}: a pipeline of Hugging Face layers without its settings; give the "
            "config.json of the model with --config"
        )
    layers = {n.split(".")[2] for n in names.values() if n.startswith("model.layers.")}
    check_structure(ckpt, {"num_hidden_layers": len(layers)})
    tied = _HEAD not in names.values()
    rows = next(t.shape[0] for n, t in ckpt.weights.items() if names[n] == _EMBEDDING)
    config = {**ckpt.config, "tie_word_embeddings": tied}
    if request.model_type is not None:
        config["model_type"] = request.model_type
    if request.vocab_size is not None:
        config["vocab_size"] = request.vocab_size
    sizes = sizes_of(config, tied, rows)
    if sizes.vocab_size > rows:
        raise ConfigError(
            f"{ckpt.path}: the embedding has {rows} rows, fewer than the vocabulary size "
            f"{sizes.vocab_size}: the config belongs to another model"
        )
    # the layer that owns a tied embedding stands for the head that uses it again
    aliases = {
        a: _HEAD if tied and names[o] == _EMBEDDING else names[o]
        for a, o in ckpt.tied.items()
        if o in names
    }
    rules = tuple(_rule(left, right) for left, right in {**names, **aliases}.items())
    return Model(Table(str(config.get("model_type")), rules), sizes, config)


def _rule(left: str, right: str) -> Rule:
    return rule(left, right, "trim_vocab" if right in (_EMBEDDING, _HEAD) else "same")


def _plan(ckpt: Checkpoint, request: Request) -> Model:
    """Embedding, decoder layers, norm and head as layers 0, 1, ...; a tied head has no weights."""
    config = ckpt.config
    if config is None:
        raise ConfigError(
            f"{ckpt.path}: a pipeline of Hugging Face layers is made by the model's settings; give "
            "its config.json with --config"
        )
    blocks = {int(m[1]) for m in map(_BLOCK.match, ckpt.weights) if m}
    tied = _HEAD in ckpt.tied
    outer = {_EMBEDDING: f"{_TIED_EMBEDDING}.weight" if tied else "0.weight",
             _NORM: f"{len(blocks) + 1}.weight", _HEAD: f"{len(blocks) + 2}.weight"}  # fmt: skip
    names: dict[str, str] = {}
    for name in ckpt.weights:
        block = _BLOCK.match(name)
        if block is None and name not in outer:
            raise ConfigError(
                f"{ckpt.path}: {name!r} has no place in a pipeline of an embedding, decoder "
                "layers, a norm and a head: which layer it belongs to is up to the training "
                "script; write without --pp"
            )
        names[name] = outer[name] if block is None else f"{int(block[1]) + 1}.{block[2]}"
    rules = [rule(left, right, "same") for right, left in names.items()]
    if tied:
        rules.append(rule("0.weight", _HEAD, "same"))
    rows = ckpt.weights[_EMBEDDING].shape[0] if _EMBEDDING in ckpt.weights else 0
    buffers = ckpt.args.get("buffer_names") or []
    args = {**ckpt.args, "buffer_names": [names.get(b, b) for b in buffers]}
    sizes = sizes_of(config, tied, rows)
    return Model(Table(str(config.get("model_type")), tuple(rules)), sizes, config, args)


NAMING = Naming("deepspeed-pipeline", "DeepSpeed pipeline", _describe, _plan)
