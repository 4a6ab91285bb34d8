"""Mamba 2 and Codestral Mamba (``general.architecture`` = ``mamba2``): no attention.

``A`` and ``D`` are one number per head, here columns; ``A`` is stored as the logarithm of its
negative.
"""

from __future__ import annotations

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, f32, u32
from ..tokenizers import TokenizerRule
from ._record import Architecture, Config, TensorRule
from .mamba import CONTEXT

_LAYER = "backbone.layers.{n}"


def _inner(config: Config) -> int:
    given = config.get("intermediate_size") or config.get("d_inner")
    return int(given or config["expand"] * config["hidden_size"])


def _heads(config: Config) -> int:
    return _inner(config) // int(config["head_dim"])


def _extra_keys(config: Config) -> list[KeyValue]:
    inner = _inner(config)
    if inner != config["expand"] * config["hidden_size"] or inner % config["head_dim"]:
        raise UnsupportedError("config.json: inner size, expand and head_dim do not go together")
    numbers = {
        "context_length": CONTEXT,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.inner_size": inner,
        "ssm.state_size": config["state_size"],
        "ssm.time_step_rank": _heads(config),
        "ssm.group_count": config["n_groups"],
    }
    return [
        *(u32(f"mamba2.{key}", value) for key, value in numbers.items()),
        f32("mamba2.attention.layer_norm_rms_epsilon", config["layer_norm_epsilon"]),
    ]


def _sizes(config: Config) -> dict[str, int]:
    inner, groups = _inner(config), config["n_groups"]
    channels = inner + 2 * groups * config["state_size"]
    return {
        "inner": inner,
        "groups": groups,
        "ssm_heads": _heads(config),
        "channels": channels,
        "kernel": config["conv_kernel"],
        "one": 1,
        "projected": inner + channels + _heads(config),
    }


def _exact(
    gguf: str, hf: str, *shape: str, transform: str = "", keep_f32: bool = False
) -> TensorRule:
    return TensorRule(
        f"blk.{{n}}.{gguf}", f"{_LAYER}.mixer.{hf}", shape, transform, exact=True,
        keep_f32=keep_f32,
    )  # fmt: skip


def _linear(gguf: str, hf: str, *shape: str) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.mixer.{hf}", shape, bias="maybe")


ARCHITECTURE = Architecture(
    name="mamba2",
    classes=("Mamba2ForCausalLM",),
    prefix="backbone.",
    rope="",
    attention=False,
    defaults={
        "mamba2": {
            "vocab_size": 32768,
            "hidden_size": lambda config: config.get("d_model", 4096),
            "num_hidden_layers": lambda config: config.get("n_layer", 64),
            "state_size": lambda config: config.get("d_state", 128),
            "conv_kernel": lambda config: config.get("d_conv", 4),
            "head_dim": 64,
            "expand": 2,
            "n_groups": 8,
            "layer_norm_epsilon": 1e-5,
        },
    },
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
        "ssm.group_count",
        "attention.layer_norm_rms_epsilon",
        "general.file_type",
    ),
    tokenizer=TokenizerRule(kinds=("spm", "bpe")),
    tensors=(
        TensorRule("token_embd", "backbone.embeddings", ("vocab", "hidden")),
        TensorRule("token_embd", "backbone.embedding", ("vocab", "hidden")),
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True),
        TensorRule("output_norm", "backbone.norm_f", ("hidden",)),
        TensorRule("blk.{n}.attn_norm", f"{_LAYER}.norm", ("hidden",)),
        _exact("ssm_a", "A_log", "ssm_heads", transform="negative_exp_column"),
        _exact("ssm_d", "D", "ssm_heads", transform="column"),
        _exact("ssm_dt.bias", "dt_bias", "ssm_heads"),
        _exact(
            "ssm_conv1d.weight", "conv1d.weight", "channels", "one", "kernel",
            transform="squeeze", keep_f32=True,
        ),
        _exact("ssm_conv1d.bias", "conv1d.bias", "channels"),
        _linear("ssm_in", "in_proj", "projected", "hidden"),
        _exact("ssm_norm.weight", "norm.weight", "inner", transform="by_group"),
        _linear("ssm_out", "out_proj", "hidden", "inner"),
    ),
)  # fmt: skip
