"""metaseq's (and fairseq's) decoder names: OPT.

The fused ``qkv_proj`` holds k, v and q, in that order. Positions are learned, with two rows before
the first, as Hugging Face has them. Settings are ``cfg.model`` of the checkpoint. Source: metaseq
``models/transformer_decoder.py``, ``modules/sequence_parallel_transformer_layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World
from .table import Rule, rule

_L, _H = "decoder.layers.{i}", "model.decoder.layers.{i}"
_OFFSET = 2  # rows of the positions before the first one
_REFUSED = {
    "alibi": "positions by ALiBi",
    "decoder_learned_sinusoidal": "learned sinusoidal positions",
}


def _both(left: str, right: str, need: str = "", how: str = "same") -> list[Rule]:
    """A weight, which ``need`` demands, and its bias."""
    return [
        rule(f"{left}.weight", f"{right}.weight", how, need),
        rule(f"{left}.bias", f"{right}.bias", how),
    ]


def _rules() -> tuple[Rule, ...]:
    top, own = "model.decoder", "decoder"
    lines = [
        rule(f"{own}.embed_tokens.weight", f"{top}.embed_tokens.weight", "trim_vocab", "embedding"),
        rule(f"{own}.embed_positions.weight", f"{top}.embed_positions.weight", "same", "positions"),
        rule(f"{own}.project_in_dim.weight", f"{top}.project_in.weight"),
        rule(f"{own}.project_out_dim.weight", f"{top}.project_out.weight"),
        rule(f"{own}.output_projection.weight", "lm_head.weight", "trim_vocab", "head"),
        *_both(f"{own}.layer_norm", f"{top}.final_layer_norm"),
    ]
    for part in ("fc1", "fc2", "self_attn.out_proj"):
        lines += _both(f"{_L}.{part}", f"{_H}.{part}", part)
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        lines += _both(f"{_L}.{norm}", f"{_H}.{norm}")
    for kind, need in (("weight", "q|k|v"), ("bias", "")):
        parts = tuple(f"{_H}.self_attn.{x}_proj.{kind}" for x in "kvq")
        lines.append(rule(f"{_L}.self_attn.qkv_proj.{kind}", parts, "split_qkv_blocks", need))
        for x in "qkv":
            name = f"self_attn.{x}_proj.{kind}"
            lines.append(rule(f"{_L}.{name}", f"{_H}.{name}", "same", x if need else ""))
    return tuple(lines)


_OPT = {"opt": Variant("OPTForCausalLM", _rules())}


def _saved(ckpt: Checkpoint) -> Mapping[str, Any]:
    """The model's settings: ``cfg.model``, or ``args`` of old versions."""
    cfg = ckpt.args.get("cfg")
    found = cfg.get("model") if isinstance(cfg, Mapping) else ckpt.args.get("args")
    return found if isinstance(found, Mapping) else {}


def _settings(ckpt: Checkpoint) -> Settings:
    """Return config.json.

    Raises:
        ConfigError: settings that Hugging Face's OPT does not have.
    """
    saved = _saved(ckpt)
    heads, layers = (saved.get(f"decoder_{k}") for k in ("attention_heads", "layers"))
    tokens, places, inner = (
        ckpt.weights.get(f"decoder.{n}.weight")
        for n in ("embed_tokens", "embed_positions", "layers.0.fc1")
    )
    if type(heads) is not int or type(layers) is not int or tokens is None or inner is None:
        return {}
    problems = [what for key, what in _REFUSED.items() if saved.get(key) is True]
    if places is None:
        problems.append("no learned positions")
    if saved.get("no_scale_embedding") is False:
        problems.append("embeddings multiplied by the root of their width (no_scale_embedding)")
    if problems or places is None:
        raise ConfigError(f"{ckpt.path}: Hugging Face's OPT has no {'; '.join(problems)}")
    bare = saved.get("disable_affine_ln") is True
    return {
        "model_type": "opt",
        "hidden_size": inner.shape[1],
        "word_embed_proj_dim": tokens.shape[1],
        "ffn_dim": inner.shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": places.shape[0] - _OFFSET,
        "activation_function": saved.get("activation_fn") or "relu",
        "do_layer_norm_before": bare or "decoder.layer_norm.weight" in ckpt.weights,
        "layer_norm_elementwise_affine": not bare,
        "enable_bias": saved.get("disable_bias") is not True,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }


def _buffers(ckpt: Checkpoint) -> tuple[str, ...]:
    return tuple(n for n in ckpt.weights if n.endswith((".version", "_float_tensor")))


def _foreign(config: Settings) -> Settings:
    return {
        "cfg": {
            "model": {
                "decoder_embed_dim": config["hidden_size"],
                "decoder_ffn_embed_dim": config.get("ffn_dim"),
                "decoder_layers": config["num_hidden_layers"],
                "decoder_attention_heads": config["num_attention_heads"],
                "activation_fn": config.get("activation_function", "relu"),
                "no_scale_embedding": True,
                "decoder_learned_pos": True,
            }
        }
    }


NAMING = World("metaseq", "metaseq", lambda c: _OPT, _settings, _foreign, left_out=_buffers).naming
