"""Mamba and Falcon Mamba (``general.architecture`` = ``mamba``): no attention.

``A`` is stored as the logarithm of its negative. Falcon Mamba norms B, C and the step.
"""

from __future__ import annotations

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, boolean, f32, u32
from ..tokenizers import TokenizerRule
from ._record import Architecture, Config, Default, TensorRule

_LAYER = "backbone.layers.{n}"
CONTEXT = 2**20  # no limit of its own


def _inner(config: Config) -> int:
    return int(
        config.get("intermediate_size") or config.get("d_inner") or 2 * config["hidden_size"]
    )


def _extra_keys(config: Config) -> list[KeyValue]:
    if _inner(config) != 2 * config["hidden_size"]:
        raise UnsupportedError("config.json: llama.cpp's Mamba has an inner size of 2 hidden_size")
    numbers = {
        "context_length": CONTEXT,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.inner_size": _inner(config),
        "ssm.state_size": config["state_size"],
        "ssm.time_step_rank": config["time_step_rank"],
    }
    return [
        *(u32(f"mamba.{key}", value) for key, value in numbers.items()),
        f32("mamba.attention.layer_norm_rms_epsilon", config["layer_norm_epsilon"]),
        boolean("mamba.ssm.dt_b_c_rms", config.get("model_type") == "falcon_mamba"),
    ]


def _sizes(config: Config) -> dict[str, int]:
    inner, rank = _inner(config), config["time_step_rank"]
    return {
        "inner": inner,
        "2inner": 2 * inner,
        "rank": rank,
        "state": config["state_size"],
        "kernel": config["conv_kernel"],
        "one": 1,
        "x": rank + 2 * config["state_size"],
    }


def _linear(gguf: str, hf: str, *shape: str) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.mixer.{hf}", shape, bias="maybe")


def _exact(gguf: str, hf: str, *shape: str, transform: str = "") -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.mixer.{hf}", shape, transform, exact=True)


def _rank(config: Config) -> int:
    given = config.get("dt_rank")
    return given if isinstance(given, int) else -(-config["hidden_size"] // 16)


_COMMON: dict[str, Default] = {
    "vocab_size": 50280,
    "hidden_size": lambda config: config.get("d_model", 768),
    "num_hidden_layers": lambda config: config.get("n_layer", 32),
    "state_size": lambda config: config.get("d_state", 16),
    "conv_kernel": lambda config: config.get("d_conv", 4),
    "time_step_rank": _rank,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}

ARCHITECTURE = Architecture(
    name="mamba",
    classes=("MambaForCausalLM", "MambaLMHeadModel", "FalconMambaForCausalLM"),
    prefix="backbone.",
    rope="",
    attention=False,
    defaults={"mamba": _COMMON, "falcon_mamba": _COMMON},
    sizes=_sizes,
    drop_tied_head=True,
    extra_keys=_extra_keys,
    key_order=(
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "block_count",
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.time_step_rank",
        "attention.layer_norm_rms_epsilon",
        "ssm.dt_b_c_rms",
        "general.file_type",
    ),
    tokenizer=TokenizerRule(kinds=("spm", "bpe")),
    tensors=(
        TensorRule("token_embd", "backbone.embeddings", ("vocab", "hidden")),
        TensorRule("token_embd", "backbone.embedding", ("vocab", "hidden")),
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True),
        TensorRule("output_norm", "backbone.norm_f", ("hidden",)),
        TensorRule("blk.{n}.attn_norm", f"{_LAYER}.norm", ("hidden",)),
        _exact("ssm_a", "A_log", "inner", "state", transform="negative_exp"),
        _exact("ssm_d", "D", "inner"),
        TensorRule(
            "blk.{n}.ssm_conv1d.weight",
            f"{_LAYER}.mixer.conv1d.weight",
            ("inner", "one", "kernel"),
            "squeeze",
            exact=True,
            keep_f32=True,
        ),
        _exact("ssm_conv1d.bias", "conv1d.bias", "inner"),
        _linear("ssm_in", "in_proj", "2inner", "hidden"),
        _linear("ssm_x", "x_proj", "x", "inner"),
        _linear("ssm_dt", "dt_proj", "inner", "rank"),
        _linear("ssm_out", "out_proj", "hidden", "inner"),
    ),
)
