"""Names of Hugging Face's own TensorFlow models: ``tf_bert_model/bert/encoder/layer_._0/...``.

The first scope is the class, ``_._`` numbers a list, kernels are transposed, Conv1D biases have a
leading dim of one. Source: transformers 4 ``modeling_tf_pytorch_utils.py``.
"""

from __future__ import annotations

import re

from ...shardio.checkpoint import Checkpoint
from ..movement import transpose
from ._mirror import Step, mirrored, not_described, not_written, same, squeezed
from .record import Naming, Request

_TITLE = "Hugging Face TensorFlow"
_ENDS = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight",
         "moving_mean": "running_mean", "moving_variance": "running_var"}  # fmt: skip
_LIST = re.compile(r"_\._(?=\d)")
_SHARED = re.compile(r"\.[^.]*___([^.]*)\.")


def _torch_name(name: str) -> tuple[str, Step]:
    bare = _LIST.sub(".", name.removesuffix(":0"))
    bare = _SHARED.sub(r".\1.", bare).partition(".")[2]
    stem, dot, end = bare.rpartition(".")
    step = transpose if end == "kernel" else squeezed if end == "bias" else same
    return f"{stem}{dot}{_ENDS.get(end, end)}", step


def _restore(ckpt: Checkpoint, request: Request) -> Checkpoint:
    return mirrored(ckpt, _torch_name)


NAMING = Naming("hf_tf", _TITLE, not_described(_TITLE), not_written(_TITLE), _restore)
