"""MaxText's names: Llama, Mistral, Mixtral, Qwen 2 and 3 of google's training code, in Orbax files.

Kernels are [embed, heads, head_dim] and [heads, head_dim, embed]; scanned layers lie along dim 1,
experts in front of it. Queries of the Llama and Mixtral kinds are stored divided by
sqrt(head_dim). Llama 3.1's rotary pairs are adjacent, all others' are halves. Source: maxtext
``checkpoint_conversion/utils/param_mapping.py``, ``standalone_scripts/llama_or_mistral_ckpt.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from ...shardio.checkpoint import Checkpoint
from ._lines import Lines, Variants, config_of, layer_count, root_of
from ._steps import (
    EXPERTS,
    HEAD_BIAS,
    INTO_HEADS,
    OUT_OF_HEADS,
    chain,
    kv_heads,
    q_heads,
    rotary,
    scaled,
    trimmed,
)
from ._world import Settings, Variant, World
from .table import Rule
from .transforms import Transform

_EMBEDDING = "token_embedder.embedding"
_H = "model.layers.{i}"
_NOT_SCALED = ("qwen2", "qwen3", "qwen3_moe")
_MOE = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip


class _Model(Lines):
    """The rules of one checkpoint.

    Attributes:
        at: what comes before ``decoder``.
        end: what comes behind every name (of NNX states).
        axis: the dim of scanned layers; None where each layer has tensors of its own.
    """

    def __init__(self, ckpt: Checkpoint) -> None:
        super().__init__(ckpt.weights, layer_count(ckpt))
        plain = root_of(ckpt.weights, _EMBEDDING)
        nnx = root_of(ckpt.weights, f"{_EMBEDDING}.value")
        self.end = "" if nnx is None else ".value"
        self.at = nnx if nnx is not None else plain if plain is not None else "params.params."
        scanned = f"{self.at}decoder.layers.self_attention.query.kernel{self.end}"
        tensor = ckpt.weights.get(scanned)
        self.axis: int | None = 1
        if tensor is not None and tensor.ndim == 4 and tensor.shape[1] != self.layers:
            self.axis = 0  # param_scan_axis
        elif tensor is None and ckpt.naming == "maxtext":
            self.axis = None

    def outer(self, left: str, right: str, how: str | Transform, need: str) -> None:
        self.one(f"{self.at}{left}{self.end}", right, how, need)

    def layer(self, left: str, right: str, how: str | Transform = "same", need: str = "") -> None:
        if self.axis is None:
            self.each(f"{self.at}decoder.layers_{{i}}.{left}{self.end}", f"{_H}.{right}", how, need)
        else:
            name = f"{self.at}decoder.layers.{left}{self.end}"
            self.stacked(name, f"{_H}.{right}", how, need, axis=self.axis)


def _rules(ckpt: Checkpoint, kind: str) -> list[Rule]:
    model = _Model(ckpt)
    model.outer(_EMBEDDING, "model.embed_tokens.weight", "trim_vocab", "embedding")
    model.outer("decoder.decoder_norm.scale", "model.norm.weight", "same", "final norm")
    model.outer("decoder.logits_dense.kernel", "lm_head.weight", trimmed("transpose"), "head")
    for left, right in (("pre", "input_layernorm"), ("post", "post_attention_layernorm")):
        name = f"{left}_self_attention_layer_norm.scale"
        model.layer(name, f"{right}.weight", "same", right)
    for word, x, heads in (("query", "q", q_heads), ("key", "k", kv_heads)):
        steps: list[str | Transform] = [INTO_HEADS]
        if _adjacent_pairs(ckpt, kind):
            steps.append(rotary(heads))
        if x == "q" and kind not in _NOT_SCALED:
            steps.append(scaled(lambda sizes: sqrt(sizes.head_dim)))
        model.layer(f"self_attention.{word}.kernel", f"self_attn.{x}_proj.weight",
                    chain(*steps), x)  # fmt: skip
        model.layer(f"self_attention.{word}_norm.scale", f"self_attn.{x}_norm.weight")
    model.layer("self_attention.value.kernel", "self_attn.v_proj.weight", INTO_HEADS, "v")
    model.layer("self_attention.out.kernel", "self_attn.o_proj.weight", OUT_OF_HEADS, "output")
    for word in ("query", "key", "value"):
        right = f"self_attn.{word[0]}_proj.bias"
        model.layer(f"self_attention.{word}.bias", right, HEAD_BIAS)
    _feed_forward(model, kind)
    return model.rules


def _feed_forward(model: _Model, kind: str) -> None:
    words = ("wi_0", "wi_1", "wo")
    if kind not in _MOE:
        for word, right in zip(words, ("gate", "up", "down"), strict=True):
            model.layer(f"mlp.{word}.kernel", f"mlp.{right}_proj.weight", "transpose", right)
        return
    block, names = _MOE[kind]
    usual = "MoeBlock_0" if kind == "mixtral" else "moe_block"
    found = [b for b in ("MoeBlock_0", "moe_block") if any(f".{b}." in n for n in model.weights)]
    at = found[0] if found else usual
    model.layer(f"{at}.gate.kernel", f"{block}.gate.weight", "transpose", "router")
    for word, right in zip(words, names, strict=True):
        model.layer(f"{at}.{word}", f"{block}.experts.{{e}}.{right}.weight", EXPERTS, right)


def _adjacent_pairs(ckpt: Checkpoint, kind: str) -> bool:
    """Whether rotary pairs lie side by side: with Llama 3.1's frequencies only."""
    config = config_of(ckpt)
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if kind != "llama" or not isinstance(scaling, Mapping):
        return False
    return (scaling.get("rope_type") or scaling.get("type")) == "llama3"


def _variants(ckpt: Checkpoint) -> Mapping[str, Variant]:
    return Variants(_ARCHITECTURES, lambda kind: _rules(ckpt, kind))


def _foreign(config: Settings) -> Settings:
    return {"model_type": config.get("model_type"), "scan_layers": True, "param_scan_axis": 1}


NAMING = World("maxtext", "MaxText", _variants, lambda ckpt: {}, _foreign).naming
