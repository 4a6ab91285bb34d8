"""Lines of tensor tables that many families share, with the Hugging Face names most of them use.

Shapes are those of ``dimensions``. Families add, replace or reorder lines in their own files.
"""

from __future__ import annotations

from ._record import TensorRule

LAYER = "model.layers.{n}"

EMBEDDING = TensorRule("token_embd", "model.embed_tokens", ("vocab", "hidden"))
HEAD = TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True)
FRAME = (EMBEDDING, HEAD, TensorRule("output_norm", "model.norm", ("hidden",)))
NORMS = (
    TensorRule("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", ("hidden",)),
    TensorRule("blk.{n}.ffn_norm", f"{LAYER}.post_attention_layernorm", ("hidden",)),
)


def attention(
    *, permuted: bool = False, bias: str = "maybe", out_bias: str | None = None
) -> tuple[TensorRule, ...]:
    """Return query, key, value and output projections.

    Args:
        permuted: bring rotary halves into adjacent pairs.
        bias: of query, key and value.
        out_bias: of the output; None: as the others.
    """
    q, k = ("permute_q", "permute_k") if permuted else ("", "")
    at = f"{LAYER}.self_attn"
    return (
        TensorRule("blk.{n}.attn_q", f"{at}.q_proj", ("q", "hidden"), q, bias=bias),
        TensorRule("blk.{n}.attn_k", f"{at}.k_proj", ("kv", "hidden"), k, bias=bias),
        TensorRule("blk.{n}.attn_v", f"{at}.v_proj", ("kv", "hidden"), bias=bias),
        TensorRule("blk.{n}.attn_output", f"{at}.o_proj", ("hidden", "q"), bias=out_bias or bias),
    )


def head_norms(*shapes: str, transform: str = "", optional: bool = False) -> tuple[TensorRule, ...]:
    """Return the norms of query and key; ``shapes``: their sizes, ``head`` when not given."""
    q, k = shapes or ("head", "head")
    at = f"{LAYER}.self_attn"
    return (
        TensorRule("blk.{n}.attn_q_norm", f"{at}.q_norm", (q,), transform, optional=optional),
        TensorRule("blk.{n}.attn_k_norm", f"{at}.k_norm", (k,), transform, optional=optional),
    )


def gated_mlp(
    at: str = f"{LAYER}.mlp",
    to: str = "",
    size: str = "ff",
    *,
    bias: str = "no",
    layers: str = "",
    needs: str = "",
) -> tuple[TensorRule, ...]:
    """Return gate, up and down projections.

    Args:
        at: where they are.
        to: ending of the GGUF names, such as ``_shexp``.
        size: name of the inner size.
        bias: of all three.
        layers: in which layers.
        needs: entry of ``config.json`` they go with.
    """
    up, down = (size, "hidden"), ("hidden", size)
    return tuple(
        TensorRule(
            f"blk.{{n}}.ffn_{name}{to}",
            f"{at}.{name}_proj",
            shape,
            bias=bias,
            layers=layers,
            needs=needs,
        )
        for name, shape in (("gate", up), ("up", up), ("down", down))
    )


def ungated_mlp(*, bias: str = "no") -> tuple[TensorRule, ...]:
    """Return up and down projections."""
    return tuple(rule for rule in gated_mlp(bias=bias) if ".ffn_gate" not in rule.outputs[0])


def router(hf: str) -> TensorRule:
    """Return the matrix that scores experts; it stays F32."""
    return TensorRule(
        "blk.{n}.ffn_gate_inp", hf, ("experts", "hidden"), keep_f32=True, layers="moe"
    )


def correction_bias(hf: str = f"{LAYER}.mlp.gate.e_score_correction_bias") -> TensorRule:
    """Return what is added to the scores of experts when they are chosen."""
    return TensorRule(
        "blk.{n}.exp_probs_b.bias", hf, ("experts",), optional=True, exact=True, layers="moe"
    )


def experts(
    at: str = f"{LAYER}.mlp.experts",
    names: tuple[tuple[str, str], ...] = (
        ("down", "down_proj"),
        ("gate", "gate_proj"),
        ("up", "up_proj"),
    ),
) -> tuple[TensorRule, ...]:
    """Return one tensor per expert and matrix, stacked; ``names``: GGUF part and HF name."""
    return tuple(
        TensorRule(
            f"blk.{{n}}.ffn_{part}_exps",
            f"{at}.{{e}}.{name}",
            ("hidden", "moe_ff") if part == "down" else ("moe_ff", "hidden"),
            layers="moe",
        )
        for part, name in names
    )


def shared_expert(at: str = f"{LAYER}.mlp") -> tuple[TensorRule, ...]:
    """Return the expert that always runs and the row that weighs it (sizes: ``one``)."""
    return (
        *gated_mlp(f"{at}.shared_expert", "_shexp", "shared_ff", layers="moe"),
        TensorRule(
            "blk.{n}.ffn_gate_inp_shexp",
            f"{at}.shared_expert_gate",
            ("one", "hidden"),
            keep_f32=True,
            layers="moe",
        ),
    )


def fused_experts(at: str = f"{LAYER}.mlp.experts") -> tuple[TensorRule, ...]:
    """Return the experts as transformers 5 holds them in memory: stacked, gate and up in one."""
    return (
        TensorRule(
            "blk.{n}.ffn_down_exps.weight",
            f"{at}.down_proj",
            ("experts", "hidden", "moe_ff"),
            exact=True,
            layers="moe",
        ),
        TensorRule(
            ("blk.{n}.ffn_gate_exps.weight", "blk.{n}.ffn_up_exps.weight"),
            f"{at}.gate_up_proj",
            ("experts", "2moe_ff", "hidden"),
            "split_gate_up",
            exact=True,
            layers="moe",
        ),
    )
