"""T5's own checkpoints (mesh TensorFlow): ``encoder/block_000/layer_000/SelfAttention/q``.

All matrices are transposed, the position biases too; the embedding is not. Settings are in a gin
file that is not read: config.json is needed. Source: text-to-text-transfer-transformer,
transformers ``modeling_t5.py`` (version 4, ``load_tf_weights_in_t5``).
"""

from __future__ import annotations

import re

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ..movement import transpose
from ._mirror import Step, mirrored, not_described, not_written, same
from .record import Naming, Request

_TITLE = "T5 (mesh TensorFlow)"
_NUMBER = re.compile(r"(?<=\.)(block|layer)_(\d{1,4})(?=\.)")
_PROJECTIONS = ("q", "k", "v", "o")


def _torch_name(name: str) -> tuple[str, Step] | None:
    if name == "shared.embedding":
        return "shared.weight", same
    if name == "decoder.logits.kernel":
        return "lm_head.weight", transpose
    if not name.startswith(("encoder.", "decoder.")):
        return None
    stem, _, end = _NUMBER.sub(_plain, name).rpartition(".")
    stem = re.sub(r"^(\w+)\.rms_norm$", r"\1.final_layer_norm", stem)
    stem = stem.replace(".rms_norm", ".layer_norm")
    if end == "scale":
        return f"{stem}.weight", same
    if end == "kernel":
        return f"{stem}.weight", transpose
    if end in _PROJECTIONS or end == "relative_attention_bias":
        return f"{stem}.{end}.weight", transpose
    return f"{stem}.{end}", same


def _plain(m: re.Match[str]) -> str:
    return f"{m[1]}.{int(m[2])}"


def _restore(ckpt: Checkpoint, request: Request) -> Checkpoint:
    if ckpt.config is None:
        raise ConfigError(
            f"{ckpt.path}: {_TITLE} names, but no settings; give the Hugging Face config.json of "
            "the model with --config"
        )
    return mirrored(ckpt, _torch_name)


NAMING = Naming("t5_tf", _TITLE, not_described(_TITLE), not_written(_TITLE), _restore)
