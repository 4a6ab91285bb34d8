"""nanoGPT's names: GPT-2's, on linear layers ([out, in]) where GPT-2 has Conv1D ([in, out]).

Models without biases get zeros, because Hugging Face's GPT-2 has no such option. Settings are
``model_args`` within ``ckpt.pt``. Source: karpathy's nanoGPT ``model.py`` and ``train.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World
from .table import Rule, rule

_B = "transformer.h.{i}"
_LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def _rules(bias: bool) -> tuple[Rule, ...]:
    lines = [
        rule("transformer.wte.weight", "transformer.wte.weight", "trim_vocab", "embedding"),
        rule("transformer.wpe.weight", "transformer.wpe.weight", "same", "positions"),
        rule("lm_head.weight", "lm_head.weight", "trim_vocab", "head"),
    ]
    norms = [(f"{_B}.ln_1", "first norm"), (f"{_B}.ln_2", "second norm")]
    for place, need in [*norms, ("transformer.ln_f", "final norm")]:
        lines += _layer(place, "same", need, bias)
    for part in _LINEAR:
        lines += _layer(f"{_B}.{part}", "transpose", part, bias)
    return tuple(lines)


def _layer(place: str, how: str, need: str, bias: bool) -> tuple[Rule, ...]:
    weight, offset = f"{place}.weight", f"{place}.bias"
    if not bias:
        return (rule(weight, (weight, offset), f"{how}_zero_bias", need),)
    return rule(weight, weight, how, need), rule(offset, offset, "same", f"{need} bias")


_ARCHITECTURE = "GPT2LMHeadModel"
_WITH = Variant(_ARCHITECTURE, _rules(bias=True))
_WITHOUT = Variant(_ARCHITECTURE, _rules(bias=False), "the model has no biases: GPT-2's get zeros")


def _has_bias(ckpt: Checkpoint) -> bool:
    return "transformer.ln_f.bias" in ckpt.weights


def _settings(ckpt: Checkpoint) -> Settings:
    args = ckpt.args.get("model_args")
    if not isinstance(args, Mapping) or type(args.get("n_head")) is not int:
        return {}
    config: dict[str, Any] = {
        "model_type": "gpt2",
        "n_embd": args.get("n_embd"),
        "n_layer": args.get("n_layer"),
        "n_head": args["n_head"],
        "n_positions": args.get("block_size"),
        "n_ctx": args.get("block_size"),
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu",
    }
    if type(args.get("vocab_size")) is int:
        config["vocab_size"] = args["vocab_size"]
    return config


def _notes(ckpt: Checkpoint) -> tuple[str, ...]:
    if ckpt.config is not None and "model_type" in ckpt.config:
        return ()
    return (
        "the activation is taken as exact gelu; nanoGPT before June 2023 and models started from "
        "GPT-2 used the tanh form (gelu_new): give a config.json with --config then",
    )


def _masks(ckpt: Checkpoint) -> tuple[str, ...]:
    """The causal masks that old versions kept as buffers."""
    return tuple(n for n, t in ckpt.weights.items() if n.endswith(".attn.bias") and t.ndim == 4)


def _foreign(config: Settings) -> Settings:
    return {
        "model_args": {
            "n_layer": config["n_layer"],
            "n_head": config["n_head"],
            "n_embd": config["n_embd"],
            "block_size": config.get("n_positions"),
            "vocab_size": config["vocab_size"],
            "bias": True,
        }
    }


def _choose(ckpt: Checkpoint) -> Mapping[str, Variant]:
    return {"gpt2": _WITH if _has_bias(ckpt) or ckpt.naming == "hf" else _WITHOUT}


NAMING = World(
    "nanogpt",
    "nanoGPT",
    _choose,
    _settings,
    _foreign,
    left_out=_masks,
    notes=_notes,
).naming
