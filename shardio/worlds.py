"""Which naming world the keys of a state dict belong to, told by one marker name each.

Plain containers (``torch.save``, DCP, safetensors) do not say which code trained the model, but
its parameter names do: ``layers.0.attention.wq.weight`` is Meta's,
``blocks.0.attention.w_q.weight`` OLMo-core's. Translating them is the business of
``convert/naming``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .tensor import LazyTensor

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

#: (naming, marker with # for numbers); the first that is there wins.
_MARKERS = (
    ("torchtitan", "layers.#.attention.qkv_linear.wq.weight"),
    ("torchtitan", "layers.#.attention.wkv_a.weight"),
    ("meta", "layers.#.attention.wq.weight"),
    ("torchtune", "layers.#.attn.q_proj.weight"),
    ("litgpt", "transformer.h.#.attn.qkv.weight"),
    ("litgpt", "transformer.h.#.attn.attn.weight"),
    ("olmo", "transformer.blocks.#.att_proj.weight"),
    ("olmo", "model.transformer.blocks.#.att_proj.weight"),
    ("metaseq", "decoder.layers.#.self_attn.qkv_proj.weight"),
    ("olmo_core", "blocks.#.attention.w_q.weight"),
    ("mindspore", "model.layers.#.attention.wq.weight"),
    ("mindspore", "model.layers.#.attention.w_qkv.weight"),
)
_PADDLE_ROOTS = ("llama", "mistral", "mixtral", "qwen2")
_PADDLE = tuple(
    f"{root}.layers.#.self_attn.{part}.weight"
    for root in _PADDLE_ROOTS
    for part in ("q_proj", "qkv_proj")
)
_METASEQ = {"decoder.layers.#.self_attn.q_proj.weight", "decoder.layer_norm.weight"}
_QUERY_NORM = "layers.#.attention.q_norm.weight"
_GPT = "transformer.h.#.attn.c_attn.weight"


def world_of(weights: Mapping[str, LazyTensor], container: str = "") -> str:
    """Return the naming of a model's tensors (no wrapper prefixes); ``hf`` if unknown.

    torchtitan began with Meta's names, which it saves as DCP where Meta never does (``container``);
    nanoGPT has GPT-2's names on linear layers, [3n, n], where GPT-2 has Conv1D, [n, 3n].
    """
    seen = {_NUMBER.sub("#", name): t for name, t in weights.items()}
    for naming, marker in _MARKERS:
        if marker in seen:
            titan = naming == "meta" and (container == "dcp" or _QUERY_NORM in seen)
            return "torchtitan" if titan else naming
    if not seen.keys().isdisjoint(_PADDLE):
        return "paddlenlp"
    if seen.keys() >= _METASEQ and not any(n.startswith("encoder.") for n in seen):
        return "metaseq"
    fused = seen.get(_GPT)
    if fused is not None and fused.ndim == 2 and fused.shape[0] == 3 * fused.shape[1]:
        return "nanogpt"
    return "hf"
