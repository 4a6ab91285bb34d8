"""Meta's names: Llama 1 to 3 (``consolidated.NN.pth``), Mistral's own files, llama2.c.

``wq`` and ``wk`` keep rotary pairs in adjacent rows where Hugging Face has halves. Settings are
``params.json``, or ``model_args`` within llama2.c's ``ckpt.pt``. Source: Meta ``llama``,
``llama-models``, mistral-inference, karpathy's llama2.c, and the converters in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World, rope_theta
from .table import Rule, rule

_L, _H = "layers.{i}", "model.layers.{i}"
#: What newer models of Mistral say and config.json says in ways of its own.
_UNTRANSLATED = ("yarn", "llama_4_scaling", "vision_encoder", "audio_encoder", "qk_rope_head_dim")
#: Models of Llama 3.2 with (dim, n_layers): their rotary scaling is 32, which params.json omits.
_LLAMA_3_2 = ((2048, 16), (3072, 28))
_LLAMA_3_SCALING = {
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def outer(head: str = "output.weight") -> tuple[Rule, ...]:
    """Embedding, final norm and head, as Meta names them."""
    return (
        rule("tok_embeddings.weight", "model.embed_tokens.weight", "trim_vocab", "embedding"),
        rule("norm.weight", "model.norm.weight", "same", "final norm"),
        rule(head, "lm_head.weight", "trim_vocab", "head"),
    )


def attention(place: str, *, rotary_pairs: bool) -> tuple[Rule, ...]:
    """The four projections below ``place`` and their biases."""
    rules = []
    for left, right, how in (
        ("wq", "q_proj", "deinterleave_q"),
        ("wk", "k_proj", "deinterleave_k"),
        ("wv", "v_proj", "same"),
        ("wo", "o_proj", "same"),
    ):
        how = how if rotary_pairs else "same"
        target = f"{_H}.self_attn.{right}"
        need = {"wq": "query", "wk": "key", "wv": "value", "wo": "attention output"}[left]
        rules.append(rule(f"{place}.{left}.weight", f"{target}.weight", how, need))
        rules.append(rule(f"{place}.{left}.bias", f"{target}.bias", how))
    return tuple(rules)


def norms() -> tuple[Rule, ...]:
    """The two norms of a layer."""
    return (
        rule(f"{_L}.attention_norm.weight", f"{_H}.input_layernorm.weight", "same", "first norm"),
        rule(
            f"{_L}.ffn_norm.weight", f"{_H}.post_attention_layernorm.weight", "same", "second norm"
        ),
    )


def feed_forward() -> tuple[Rule, ...]:
    """The gated MLP of a layer."""
    pairs = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    return tuple(
        rule(f"{_L}.feed_forward.{w}.weight", f"{_H}.mlp.{p}.weight", "same", f"MLP {w}")
        for w, p in pairs
    )


def _experts() -> tuple[Rule, ...]:
    moe = f"{_H}.block_sparse_moe"
    return (
        rule(f"{_L}.feed_forward.gate.weight", f"{moe}.gate.weight", "same", "router"),
        *(
            rule(
                f"{_L}.feed_forward.experts.{{e}}.{w}.weight",
                f"{moe}.experts.{{e}}.{w}.weight",
                "same",
                f"MLP {w}",
            )
            for w in ("w1", "w2", "w3")
        ),
    )


_BODY = (*outer(), *attention(f"{_L}.attention", rotary_pairs=True), *norms())
VARIANTS = {
    "llama": Variant("LlamaForCausalLM", (*_BODY, *feed_forward())),
    "mistral": Variant("MistralForCausalLM", (*_BODY, *feed_forward())),
    "mixtral": Variant("MixtralForCausalLM", (*_BODY, *_experts())),
}


def _params(ckpt: Checkpoint) -> Mapping[str, Any]:
    nested = ckpt.args.get("model_args")
    return nested if isinstance(nested, Mapping) else ckpt.args


def settings(ckpt: Checkpoint) -> Settings:
    """Return config.json of ``params.json``; the MLP's width is that of ``w1``."""
    params = _params(ckpt)
    if not all(type(params.get(k)) is int for k in ("dim", "n_layers", "n_heads")):
        return {}
    dim, heads = params["dim"], params["n_heads"]
    for key in ("n_kv_heads", "head_dim", "norm_eps", "rope_theta"):
        if not isinstance(params.get(key), int | float | None):
            raise ConfigError(f"{ckpt.path}: {key} is {params[key]!r}, a number is needed")
    if ckpt.config is None or "model_type" not in ckpt.config:
        other = [k for k in _UNTRANSLATED if params.get(k) is not None]
        if other:
            raise ConfigError(
                f"{ckpt.path}: params.json has {', '.join(other)}, which are not translated; give "
                "the Hugging Face config.json of the model with --config"
            )
    moe = params.get("moe")
    width = next((t.shape[0] for n, t in ckpt.weights.items() if n.endswith("w1.weight")), None)
    if width is None or heads < 1:
        raise ConfigError(f"{ckpt.path}: no layer has a feed_forward.w1.weight: incomplete")
    mistral = "hidden_dim" in params and "multiple_of" not in params
    config: dict[str, Any] = {
        "model_type": "mixtral" if moe else "mistral" if mistral else "llama",
        "hidden_size": dim,
        "intermediate_size": width,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or dim // heads,
        "hidden_act": "silu",
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta") or 10000.0,
        "max_position_embeddings": _context(params, mistral),
    }
    if type(params.get("vocab_size")) is int and params["vocab_size"] > 0:
        config["vocab_size"] = params["vocab_size"]
    if mistral or moe:
        config["sliding_window"] = params.get("sliding_window")
    if isinstance(moe, Mapping):
        config["num_local_experts"] = moe.get("num_experts")
        config["num_experts_per_tok"] = moe.get("num_experts_per_tok")
    if params.get("use_scaled_rope"):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": _factor(dim, params["n_layers"], params),
            **_LLAMA_3_SCALING,
        }
    return config


def _context(params: Mapping[str, Any], mistral: bool) -> int:
    """The context length, which only some params.json say; the others by generation."""
    for key in ("max_position_embeddings", "max_seq_len"):
        if type(params.get(key)) is int:
            return int(params[key])
    if mistral or params.get("moe"):
        return 32768
    if params.get("use_scaled_rope"):
        return 131072
    if (params.get("rope_theta") or 0) >= 500000:
        return 8192
    return 2048 if params.get("norm_eps") == 1e-6 else 4096


def _notes(ckpt: Checkpoint) -> tuple[str, ...]:
    params = _params(ckpt)
    known = ckpt.config is not None and "model_type" in ckpt.config
    if known or not params or "max_seq_len" in params:
        return ()
    found = [f"the context length {settings(ckpt).get('max_position_embeddings')}"]
    if params.get("use_scaled_rope"):
        found.append(f"the rotary scaling factor {settings(ckpt)['rope_scaling']['factor']:g}")
    return (
        f"{' and '.join(found)} of this model generation: params.json does not say; give the "
        "config.json with --config if it differs",
    )


def _foreign(config: Settings) -> Settings:
    """``params.json``: of Meta for Llama, of Mistral for its models.

    Raises:
        ConfigError: a rotary scaling that neither code knows.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    params: dict[str, Any] = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads") or heads,
        "vocab_size": config["vocab_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "rope_theta": rope_theta(config),
    }
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if isinstance(scaling, Mapping):
        params |= _scaled(config, scaling)
    if config.get("model_type") == "llama":
        if head_dim * heads != config["hidden_size"]:
            raise ConfigError(
                f"head_dim {head_dim} x {heads} heads is not hidden_size {config['hidden_size']}: "
                "Meta's params.json cannot say so"
            )
        return params | _width(config["hidden_size"], config["intermediate_size"])
    params |= {"head_dim": head_dim, "hidden_dim": config["intermediate_size"]}
    if config.get("sliding_window"):
        params["sliding_window"] = config["sliding_window"]
    if "num_local_experts" in config:
        params["moe"] = {
            "num_experts": config["num_local_experts"],
            "num_experts_per_tok": config.get("num_experts_per_tok", 2),
        }
    return params


def _width(dim: int, inner: int) -> dict[str, Any]:
    """How Meta says the MLP's width: 8/3 of ``dim``, times a factor, rounded up to a multiple."""
    base = int(2 * 4 * dim / 3)
    for factor in (None, 1.3, 1.5, 1.4, 1.0, 1.2):
        for multiple in (256, 1024, 4096, 32):
            if -(-int((factor or 1) * base) // multiple) * multiple == inner:
                found = {"multiple_of": multiple}
                return found if factor is None else {"ffn_dim_multiplier": factor, **found}
    found = {"multiple_of": inner}
    return found if base <= inner else {"ffn_dim_multiplier": (inner - 0.5) / base, **found}


def _scaled(config: Settings, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary scaling of Llama 3.1 and later."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {}
    factor = scaling.get("factor")
    same = all(scaling.get(k) == v for k, v in _LLAMA_3_SCALING.items())
    if kind != "llama3" or not same or not isinstance(factor, int | float):
        raise ConfigError(f"Meta's params.json has no word for the rotary scaling {dict(scaling)}")
    found: dict[str, Any] = {"use_scaled_rope": True}
    if factor != _factor(config["hidden_size"], config["num_hidden_layers"], {}):
        found["rope_scaling_factor"] = factor
    return found


def _factor(dim: int, layers: int, params: Mapping[str, Any]) -> float:
    """What rotary scaling divides by; newer params.json say it, older ones by generation."""
    said = params.get("rope_scaling_factor")
    if isinstance(said, int | float):
        return float(said)
    return 32.0 if (dim, layers) in _LLAMA_3_2 else 8.0


NAMING = World(
    "meta",
    "Meta",
    lambda ckpt: VARIANTS,
    settings,
    _foreign,
    buffers=("rope.freqs", "freqs_cis", "freqs_cos", "freqs_sin"),
    notes=_notes,
).naming
