"""OpenAI's own GPT-2 checkpoints (TensorFlow 1): ``model/h0/attn/c_attn/w`` with ``hparams.json``.

Weights are those of Hugging Face's Conv1D with a leading dim of one. Source: openai gpt-2
``src/model.py``, transformers ``convert_gpt2_original_tf_checkpoint_to_pytorch.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ._mirror import Step, mirrored, not_described, not_written, same, squeezed
from .record import Naming, Request

_TITLE = "OpenAI GPT-2"
_LAYER = re.compile(r"^h(\d{1,4})\.(.+)\.([a-z]+)$")
_ENDS = {"w": "weight", "g": "weight", "b": "bias"}
_KEYS = {"n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer", "n_ctx": "n_positions"}


def _torch_name(name: str) -> tuple[str, Step] | None:
    bare = name.removeprefix("model.")
    if bare in ("wte", "wpe"):
        return f"transformer.{bare}.weight", same
    m = _LAYER.match(bare)
    if m and m[3] in _ENDS:
        return f"transformer.h.{int(m[1])}.{m[2]}.{_ENDS[m[3]]}", squeezed
    stem, _, end = bare.rpartition(".")
    if stem == "ln_f" and end in _ENDS:
        return f"transformer.ln_f.{_ENDS[end]}", same
    return None


def _config(ckpt: Checkpoint) -> Mapping[str, Any]:
    if ckpt.config is not None and "model_type" in ckpt.config:
        return ckpt.config
    own = ckpt.args.get("hparams.json")
    if not isinstance(own, Mapping) or not all(
        type(own.get(k)) is int and own[k] > 0 for k in (*_KEYS, "n_vocab")
    ):
        raise ConfigError(
            f"{ckpt.path}: the number of heads is in hparams.json, which is not beside it or not "
            "whole; put it there or give a config.json with --config"
        )
    config: dict[str, Any] = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": own["n_vocab"],
        **{hf: own[k] for k, hf in _KEYS.items()},
        "n_ctx": own["n_ctx"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
    if own["n_vocab"] == 50257:
        config |= {"bos_token_id": 50256, "eos_token_id": 50256}
    return config


def _restore(ckpt: Checkpoint, request: Request) -> Checkpoint:
    config = _config(ckpt)
    made = mirrored(ckpt, _torch_name, config)
    layers = {n.split(".")[2] for n in made.weights if n.startswith("transformer.h.")}
    if len(layers) != config.get("n_layer"):
        raise ConfigError(
            f"{ckpt.path}: has {len(layers)} layers, its settings say {config.get('n_layer')}"
        )
    return made


NAMING = Naming("gpt2_tf", _TITLE, not_described(_TITLE), not_written(_TITLE), _restore)
