"""Google's own BERT checkpoints (TensorFlow 1):
``bert/encoder/layer_0/attention/self/query/kernel``.

``bert_config.json`` is Hugging Face's config without the model type. Kernels are transposed.
Source: google-research bert ``modeling.py``, ``run_pretraining.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ..movement import transpose
from ._mirror import Step, mirrored, not_described, not_written, same
from .record import Naming, Request

_TITLE = "Google BERT"
_LAYER = re.compile(r"(?<=\.)layer_(\d+)(?=\.)")
_ENDS = {"kernel": "weight", "gamma": "weight", "beta": "bias"}
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_HEADS = {
    "cls.predictions.output_bias": "cls.predictions.bias",
    "cls.seq_relationship.output_weights": "cls.seq_relationship.weight",
    "cls.seq_relationship.output_bias": "cls.seq_relationship.bias",
}


def _torch_name(name: str) -> tuple[str, Step] | None:
    if name in _HEADS:
        return _HEADS[name], same
    if not name.startswith(("bert.", "cls.")):
        return None
    stem, _, end = _LAYER.sub(r"layer.\1", name).rpartition(".")
    if end in _TABLES:
        return f"{stem}.{end}.weight", same
    return f"{stem}.{_ENDS.get(end, end)}", transpose if end == "kernel" else same


def _config(ckpt: Checkpoint) -> Mapping[str, Any]:
    if ckpt.config is not None and "model_type" in ckpt.config:
        return ckpt.config
    own = ckpt.args.get("bert_config.json")
    if not isinstance(own, Mapping) or type(own.get("num_attention_heads")) is not int:
        raise ConfigError(
            f"{ckpt.path}: the number of heads is in bert_config.json, which is not beside it; put "
            "it there or give a config.json with --config"
        )
    masked = any(n.startswith("cls.predictions.") for n in ckpt.weights)
    architecture = "BertForMaskedLM" if masked else "BertModel"
    return {**own, "model_type": "bert", "architectures": [architecture], "layer_norm_eps": 1e-12}


def _restore(ckpt: Checkpoint, request: Request) -> Checkpoint:
    return mirrored(ckpt, _torch_name, _config(ckpt))


NAMING = Naming("bert_tf", _TITLE, not_described(_TITLE), not_written(_TITLE), _restore)
