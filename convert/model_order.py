"""Weights in the order in which a Hugging Face model registers its parameters.

torch optimizers number parameters, and ZeRO joins them, in that order. Training formats keep it;
safetensors files sort by name, and translated names come in table order: there the names tell it
(``shardio/hf_order.py``).
"""

from __future__ import annotations

from dataclasses import replace

from ..shardio import Checkpoint
from ..shardio.hf_order import by_registration

_TRUE_ORDER = ("deepspeed", "deepspeed-universal", "torch_save", "torch_ranks", "dcp")


def in_model_order(ckpt: Checkpoint) -> Checkpoint:
    """Return the checkpoint (HF names) with its weights in the order of the model.

    A warning is added where neither the source nor the names tell it.
    """
    if ckpt.format in _TRUE_ORDER:
        return ckpt
    names = by_registration(ckpt.weights)
    if names is not None:
        return replace(ckpt, weights={n: ckpt.weights[n] for n in names})
    note = (
        "the order in which the model registers its parameters is not known: optimizer states are "
        "numbered in the order of the source; compare a loss after loading"
    )
    return replace(ckpt, warnings=(*ckpt.warnings, note))
