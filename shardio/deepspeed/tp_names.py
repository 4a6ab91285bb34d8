"""Tensor-parallel cuts by layer name, for checkpoints that do not describe them: AutoTP before 0.19
and Megatron-DeepSpeed without ``universal_checkpoint_info``.

Column-parallel layers are cut on dim 0 with their bias, row-parallel ones on dim 1 with the bias on
every rank; norms are on every rank. The vocabulary is cut unless every rank has all of its rows. In
the pipelines of BLOOM's time the copies drifted apart, and the published models have their mean
(transformers ``convert_bloom_original_checkpoint_to_pytorch.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UnsupportedError
from ..placement import Fused, Placement, Replicate, Shard
from . import neox
from .fused import Average

_ROW = re.compile(
    r"(?:^|\.)(?:o_proj|down_proj|out_proj|fc2|dense_4h_to_h|"
    r"(?:self_attention|attention|attn|self_attn)\.(?:dense|c_proj|wo)|mlp\.c_proj|w2)\.(weight|bias)$"
)
_COLUMN = re.compile(
    r"(?:^|\.)(?:q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|w1|w3|query_key_value|query|key_value|"
    r"dense_h_to_4h|c_fc)\.(?:weight|bias)$"
)
_VOCABULARY = re.compile(
    r"(?:^|\.)(?:embed_tokens|word_embeddings|wte|lm_head|embed_out|output_layer)\.weight$"
)
_LAYER = re.compile(r"^(?:\d+|tied_modules\.embed)\.")
_FINAL_NORM = re.compile(r"^\d+\.(?:weight|bias)$")
_WHOLE = re.compile(r"(?:norm|ln_\d|ln_f|position_embeddings|rotary|router|gate\.w)[^.]*\b", re.I)


def usual_dim(name: str) -> int | None:
    """Return the dim on which tensor parallel usually cuts a parameter, None where it does not."""
    if match := _ROW.search(name):
        return 1 if match[1] == "weight" else None
    return 0 if _COLUMN.search(name) or _VOCABULARY.search(name) else None


def placement(
    name: str, shapes: Sequence[tuple[int, ...]], hints: Mapping[str, Any], source: str
) -> Placement:
    """Return how a parameter is cut.

    Args:
        name: parameter name.
        shapes: of the parts.
        hints: ``vocab_size`` and ``swiglu`` of the model, where known; ``neox`` has the settings of
            a GPT-NeoX model.
        source: file, for messages.

    Raises:
        UnsupportedError: the name is none of the usual ones.
    """
    if "neox" in hints:
        return neox.placement(name, shapes, hints["neox"], source)
    copies = Average() if _LAYER.match(name) else Replicate()
    if match := _ROW.search(name):
        return Shard(1) if match[1] == "weight" else copies
    if _COLUMN.search(name):
        if "dense_h_to_4h" in name and hints.get("swiglu"):
            half = sum(s[0] for s in shapes) // 2
            return Fused(0, (half, half))
        return Shard(0)
    if _VOCABULARY.search(name):
        return Replicate() if shapes[0][0] == hints.get("vocab_size") else Shard(0)
    if not shapes[0]:
        return Replicate()
    if _WHOLE.search(name) or (len(shapes[0]) == 1 and _FINAL_NORM.match(name)):
        return copies
    raise UnsupportedError(
        f"{source}: nothing says how {name!r} (parts {list(shapes)}) is cut over tensor-parallel "
        "ranks: no universal_checkpoint_info, and the name is not one of the usual layers"
    )
