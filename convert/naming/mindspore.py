"""MindFormers' names on MindSpore: Llama, Mistral, Mixtral and Qwen 2 models.

``w_qkv`` has the rows of each key/value head together and ``w_gate_hidden`` gate and up rows by
turns, as MindFormers has them since December 2024. Experts are one tensor, [experts, out, in] or,
for grouped products, [experts, in, out]. Rotary pairs are halves. Source: mindformers
``models/llama/{convert_weight,llama_transformer,llama_layer}.py``, ``utils/convert_utils.py``,
``research/{qwen2,mixtral}/convert_weight.py``. Names of other codes are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...shardio.checkpoint import Checkpoint
from ...shardio.tensor import LazyTensor
from ._lines import Lines, Variants, layer_count
from ._mirror import keep_names
from ._steps import EXPERTS, restack, unstack
from ._world import Settings, Variant, World
from .record import Request
from .table import Rule, rule
from .transforms import Sizes, Tensors, Transform

_L, _H = "model.layers.{i}", "model.layers.{i}"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}  # fmt: skip
_EMBEDDINGS = ("model.tok_embeddings.embedding_weight", "model.tok_embeddings.weight")
_HEADS = ("lm_head.weight", "output.weight")
_FUSED = (".attention.w_qkv.weight", ".feed_forward.w_gate_hidden.weight")
_NORMS = (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
_MLP = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))


def _by_turns(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """Rows gate, up, gate, up... -> gate and up."""
    n, *rest = tensors[0].shape
    if n % 2:
        raise ValueError(f"{n} rows do not divide into gate and up")
    return unstack(tensors[0].reshape((n // 2, 2, *rest)), 1, 2)


def _taking_turns(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    both = restack(list(tensors), 1)
    return [both.reshape((-1, *both.shape[2:]))]


TURNS = Transform(_by_turns, _taking_turns)


def _rules(ckpt: Checkpoint, kind: str) -> list[Rule]:
    lines = Lines(ckpt.weights, layer_count(ckpt))
    lines.one(_there(ckpt, _EMBEDDINGS), "model.embed_tokens.weight", "trim_vocab", "embedding")
    lines.one("model.norm_out.weight", "model.norm.weight", "same", "final norm")
    lines.one(_there(ckpt, _HEADS), "lm_head.weight", "trim_vocab", "head")
    for left, right in _NORMS:
        lines.rules.append(rule(f"{_L}.{left}.weight", f"{_H}.{right}.weight", "same", right))
    for x in "qkvo":
        left, right = f"{_L}.attention.w{x}", f"{_H}.self_attn.{x}_proj"
        lines.rules.append(rule(f"{left}.weight", f"{right}.weight", "same", x))
        lines.rules.append(rule(f"{left}.bias", f"{right}.bias"))
    if ckpt.naming == "mindspore":
        for end, need in (("weight", "q|k|v"), ("bias", "")):
            parts = tuple(f"{_H}.self_attn.{x}_proj.{end}" for x in "qkv")
            lines.rules.append(rule(f"{_L}.attention.w_qkv.{end}", parts, "split_qkv", need))
    if kind == "mixtral":
        return [*lines.rules, *_experts(ckpt)]
    for left, right in _MLP:
        name = f"{_L}.feed_forward.{left}.weight"
        lines.rules.append(rule(name, f"{_H}.mlp.{right}.weight", "same", left))
    if ckpt.naming == "mindspore":
        both = tuple(f"{_H}.mlp.{x}_proj.weight" for x in ("gate", "up"))
        name = f"{_L}.feed_forward.w_gate_hidden.weight"
        lines.rules.append(rule(name, both, TURNS, "w1|w3"))
    return lines.rules


def _experts(ckpt: Checkpoint) -> list[Rule]:
    moe = f"{_H}.block_sparse_moe"
    first = ckpt.weights.get("model.layers.0.feed_forward.ffn.w1.weight")
    norm = ckpt.weights.get("model.norm_out.weight")
    turned = first is not None and norm is not None and first.shape[-1] != norm.shape[0]
    how = EXPERTS if turned else "unstack_experts"
    lines = [rule(f"{_L}.feed_forward.router.dense.weight", f"{moe}.gate.weight", "same", "router")]
    for w in ("w1", "w2", "w3"):
        left = f"{_L}.feed_forward.ffn.{w}.weight"
        lines.append(rule(left, f"{moe}.experts.{{e}}.{w}.weight", how, w))
    return lines


def _there(ckpt: Checkpoint, names: tuple[str, ...]) -> str:
    return next((n for n in names if n in ckpt.weights), names[0])


def _variants(ckpt: Checkpoint) -> Mapping[str, Variant]:
    return Variants(_ARCHITECTURES, lambda kind: _rules(ckpt, kind))


def _notes(ckpt: Checkpoint) -> tuple[str, ...]:
    if not any(n.endswith(_FUSED) for n in ckpt.weights):
        return ()
    return (
        "q, k and v (w_qkv) are taken as grouped by key/value head and gate and up "
        "(w_gate_hidden) as alternating rows, as MindFormers has them since December 2024",
    )


def _foreign(config: Settings) -> Settings:
    return {
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "n_kv_heads": config.get("num_key_value_heads"),
        "hidden_size": config["hidden_size"],
    }


def _restore(ckpt: Checkpoint, request: Request) -> Checkpoint | None:
    if any(n in ckpt.weights for n in _EMBEDDINGS):
        return None
    return keep_names(ckpt, request)


_WORLD = World("mindspore", "MindFormers", _variants, lambda ckpt: {}, _foreign, notes=_notes)
NAMING = replace(_WORLD.naming, restore=_restore)
