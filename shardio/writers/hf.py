"""``--to hf``: a Hugging Face model folder that transformers, vLLM and llama.cpp load.

``model*.safetensors`` with an index, ``config.json`` that agrees with the weights, the tokenizer
files as they were, and the optimizer as ``optimizer*.safetensors`` with keys
``<state>.<weight name>`` and ``training_state.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import dtypes
from ..checkpoint import Checkpoint
from ..layout import Layout
from ..safetensors_plan import DEFAULT_SHARD, plan_copies, plan_json, plan_tensors
from ..tensor import LazyTensor
from ..training_file import plan_training_file
from . import Planned, Writer
from ._common import only_axes

_HEADS = ("lm_head.weight",)


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the folder of a checkpoint with Hugging Face names. Raises LayoutError for any axis."""
    only_axes(layout)
    warnings: list[str] = []
    tensors = _with_aliases(ckpt, warnings)
    limit = layout.max_shard_size or DEFAULT_SHARD
    files = plan_tensors("model", tensors, limit)
    states = {f"{state}.{n}": t for state, part in ckpt.optimizer.items() for n, t in part.items()}
    if states:
        files += plan_tensors("optimizer", states, limit)
        files.append(plan_training_file(ckpt))
    if ckpt.config is not None:
        files.append(plan_json("config.json", _config(ckpt, tensors)))
    else:
        warnings.append("no config.json found: give one with --config to get a loadable model")
    files += plan_copies([p for p in ckpt.assets if p.name != "config.json"], files)
    return Planned(tuple(files), tuple(warnings))


def _with_aliases(ckpt: Checkpoint, warnings: list[str]) -> dict[str, LazyTensor]:
    """The weights to write. A tied head is left out (transformers ties it again), any other alias
    becomes a copy of its own.
    """
    tensors = dict(ckpt.weights)
    for alias, owner in ckpt.tied.items():
        if alias in tensors or owner not in tensors:
            continue
        if alias not in _HEADS:
            warnings.append(f"{alias} shares memory with {owner}: written as a copy of its own")
            tensors[alias] = tensors[owner]
    return tensors


def _config(ckpt: Checkpoint, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """The config as found, with what the weights say: dtype and tied head."""
    config = dict(ckpt.config or {})
    counts: dict[str, int] = {}
    for t in tensors.values():
        if dtypes.is_float(t.dtype):
            counts[dtypes.name(t.dtype)] = counts.get(dtypes.name(t.dtype), 0) + t.size
    if counts:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = max(counts, key=lambda k: counts[k])
    if any(alias in _HEADS for alias in ckpt.tied):
        config["tie_word_embeddings"] = True
    return config


WRITER = Writer("hf", "Hugging Face safetensors", "hf", plan, resumes=False)
