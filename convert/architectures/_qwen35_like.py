"""What Qwen3.5 has in common with and without experts: linear attention, sections of the rope."""

from __future__ import annotations

from collections.abc import Callable

from ..gguf.values import KeyValue, i32_array
from ._blocks import FRAME
from ._linear_attention import exact, full_attention, linear, linear_keys, norm, with_prediction
from ._record import Config, Default, TensorRule

#: Of the released models, for configurations that do not say.
_SECTIONS = (11, 11, 10, 0)

DEFAULTS: dict[str, Default] = {
    "vocab_size": 248320,
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def keys(name: str) -> Callable[[Config], list[KeyValue]]:
    """Return what gives the keys of linear attention and of the rope, under a GGUF name."""
    of_attention = linear_keys(name)

    def extra(config: Config) -> list[KeyValue]:
        found = of_attention(config)
        if "mrope_section" not in config["rope_parameters"]:
            found.append(i32_array(f"{name}.rope.dimension_sections", _SECTIONS))
        return found

    return extra


def tensors(mlp: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    """Return the tensor table around the given MLP."""
    layers = (
        norm("attn_norm", "input_layernorm"),
        norm("post_attention_norm", "post_attention_layernorm"),
        *full_attention(),
        exact("ssm_a", "A_log", "value_heads", transform="negative_exp_tiled"),
        exact("ssm_dt.bias", "dt_bias", "value_heads", transform="tiled"),
        exact(
            "ssm_conv1d.weight", "conv1d.weight", "mixed", "one", "kernel",
            transform="squeeze_tiled_values", keep_f32=True,
        ),
        linear("ssm_alpha", "in_proj_a", "value_heads", "hidden", transform="tiled"),
        linear("ssm_beta", "in_proj_b", "value_heads", "hidden", transform="tiled"),
        linear("attn_qkv", "in_proj_qkv", "mixed", "hidden", transform="tiled_values"),
        linear("attn_gate", "in_proj_z", "values", "hidden", transform="tiled_heads"),
        linear("ssm_norm", "norm", "value_head"),
        linear("ssm_out", "out_proj", "hidden", "values", transform="tiled_columns"),
        *mlp,
    )  # fmt: skip
    last = TensorRule("output_norm", "model.norm", ("hidden",), "plus_one")
    return (*FRAME[:2], last, *with_prediction(layers))
