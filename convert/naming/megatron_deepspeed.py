"""Megatron-DeepSpeed's names: BLOOM, and GPT-2 and Llama models trained with it.

With pipeline parallelism tensors are numbered by their place in the list of layers: BigScience's
fork has the embedding at 1 and blocks from 3 (a transposition lies between), later ones blocks from
2; the final norm has no name but its number. Without, names are those of old Megatron
(``language_model.encoder.layers.0``). q, k and v are fused per head, or per group of queries.
Hugging Face's BLOOM keeps them fused. Source: Megatron-DeepSpeed ``megatron/model/gpt_model.py``,
and the conversion of the published BLOOM (transformers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World, rope_theta
from .table import Rule, rule

NAME = "megatron-deepspeed"
_TIED = "tied_modules.embed."
_BLOCK = re.compile(r"^(\d+)\.self_attention\.query_key_value\.weight$")
_OLD = re.compile(r"^(language_model\.(?:encoder|transformer)\.)layers\.(\d+)\.")
_EMBEDDING = re.compile(r"^(\d+)\.word_embeddings\.weight$")
_HF_BLOCK = re.compile(r"^(?:transformer\.h|model\.layers)\.(\d+)\.")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def is_megatron_deepspeed(ckpt: Checkpoint) -> bool:
    """Whether a pipeline's layers are Megatron's."""
    return any(_BLOCK.match(n) for n in ckpt.weights)


class _Lines:
    """Collects the rules of one checkpoint, in the numbers that it has."""

    def __init__(self, ckpt: Checkpoint, first: int, gap: int) -> None:
        """``first`` block and ``gap`` behind the last one, where the names do not show them."""
        self.weights = ckpt.weights
        self.rules: list[Rule] = []
        self.old = next((m[1] for n in ckpt.weights if (m := _OLD.match(n))), "")
        pattern = _OLD if self.old else _BLOCK
        group = 2 if self.old else 1
        found = {int(m[group]) for n in ckpt.weights if (m := pattern.match(n))}
        known = found or {first + int(m[1]) for n in ckpt.weights if (m := _HF_BLOCK.match(n))}
        self.blocks = sorted(known)
        names = (*ckpt.weights, *ckpt.tied)
        self.start = next((m[1] for n in names if (m := _EMBEDDING.match(n))), "1")
        self.norm_at = self._norm(gap)

    def _norm(self, gap: int) -> str:
        """What the final norm's names begin with."""
        if self.old:
            return f"{self.old}final_layernorm"
        last = max(self.blocks, default=0)
        own = (n.removesuffix(".weight") for n in self.weights)
        behind = (n for n in own if n.isdigit() and int(n) > last)
        return next(behind, str(last + 1 + gap))

    def embedding(self, name: str, right: str, how: str = "same", need: str = "") -> None:
        """A tensor of the first layer: its own name, or that of a tied module."""
        if self.old:
            left = [f"language_model.embedding.{name}"]
        else:
            both = (f"{_TIED}{name}", f"{self.start}.{name}")
            left = sorted(both, key=lambda n: n not in self.weights)
        for n in left:
            self.rules.append(rule(n, right, how, need))

    def head(self, right: str) -> None:
        """The output layer, where it is not the embedding."""
        number = int(self.norm_at) + 1 if self.norm_at.isdigit() else 0
        left = "language_model.output_layer" if self.old else f"{number}.lm_head"
        self.rules.append(rule(f"{left}.weight", right, "trim_vocab", "head"))

    def final_norm(self, right: str, *kinds: str) -> None:
        """The norm behind the blocks."""
        for kind in kinds:
            left = f"{self.norm_at}.{kind}"
            self.rules.append(rule(left, f"{right}.{kind}", "same", f"final norm {kind}"))

    def each(
        self, left: str, right: str | tuple[str, ...], how: str = "same", *, need: bool = True
    ) -> None:
        """One rule per block; ``{i}`` on the right is its number."""
        sides = (right,) if isinstance(right, str) else right
        for i, number in enumerate(self.blocks):
            name = f"{self.old}layers.{number}.{left}" if self.old else f"{number}.{left}"
            wanted = f"{left} of layer {i}" if need else ""
            self.rules.append(Rule((name,), tuple(s.format(i=i) for s in sides), how, wanted))


def _bloom(ckpt: Checkpoint) -> Variant:
    lines, at = _Lines(ckpt, first=3, gap=1), "transformer.h.{i}"
    lines.embedding(
        "word_embeddings.weight", "transformer.word_embeddings.weight", "trim_vocab", "embedding"
    )
    for kind in ("weight", "bias"):
        norm = f"transformer.word_embeddings_layernorm.{kind}"
        lines.embedding(f"word_embeddings.norm.{kind}", norm, "same", f"embedding norm {kind}")
        for name in (
            *_NORMS,
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ):
            lines.each(f"{name}.{kind}", f"{at}.{name}.{kind}")
    lines.final_norm("transformer.ln_f", "weight", "bias")
    lines.head("lm_head.weight")
    return Variant("BloomForCausalLM", tuple(lines.rules))


def _gpt2(ckpt: Checkpoint) -> Variant:
    lines, at = _Lines(ckpt, first=2, gap=0), "transformer.h.{i}"
    lines.embedding("word_embeddings.weight", "transformer.wte.weight", "trim_vocab", "embedding")
    lines.embedding("position_embeddings.weight", "transformer.wpe.weight", "same", "positions")
    for kind in ("weight", "bias"):
        for left, right, how in (
            ("input_layernorm", "ln_1", "same"),
            ("post_attention_layernorm", "ln_2", "same"),
            ("self_attention.query_key_value", "attn.c_attn", "conv_qkv"),
            ("self_attention.dense", "attn.c_proj", "transpose"),
            ("mlp.dense_h_to_4h", "mlp.c_fc", "transpose"),
            ("mlp.dense_4h_to_h", "mlp.c_proj", "transpose"),
        ):
            lines.each(f"{left}.{kind}", f"{at}.{right}.{kind}", how)
    lines.final_norm("transformer.ln_f", "weight", "bias")
    lines.head("lm_head.weight")
    return Variant("GPT2LMHeadModel", tuple(lines.rules))


def _llama(ckpt: Checkpoint) -> Variant:
    lines, at = _Lines(ckpt, first=2, gap=0), "model.layers.{i}"
    lines.embedding(
        "word_embeddings.weight", "model.embed_tokens.weight", "trim_vocab", "embedding"
    )
    for norm in _NORMS:
        lines.each(f"{norm}.weight", f"{at}.{norm}.weight")
    for kind in ("weight", "bias"):
        need = kind == "weight"
        parts = tuple(f"{at}.self_attn.{x}_proj.{kind}" for x in "qkv")
        lines.each(f"self_attention.query_key_value.{kind}", parts, "split_qkv", need=need)
        lines.each(f"self_attention.dense.{kind}", f"{at}.self_attn.o_proj.{kind}", need=need)
        both = (f"{at}.mlp.gate_proj.{kind}", f"{at}.mlp.up_proj.{kind}")
        lines.each(f"mlp.dense_h_to_4h.{kind}", both, "split_gate_up", need=need)
        lines.each(f"mlp.dense_4h_to_h.{kind}", f"{at}.mlp.down_proj.{kind}", need=need)
    lines.final_norm("model.norm", "weight")
    lines.head("lm_head.weight")
    return Variant("LlamaForCausalLM", tuple(lines.rules))


def _variants(ckpt: Checkpoint) -> Mapping[str, Variant]:
    return {"bloom": _bloom(ckpt), "gpt2": _gpt2(ckpt), "llama": _llama(ckpt)}


# -- settings --------------------------------------------------------------------------------------


def _args(ckpt: Checkpoint) -> Mapping[str, Any]:
    client = ckpt.args.get("client_state")
    args = client.get("args") if isinstance(client, Mapping) else None
    return args if isinstance(args, Mapping) else {}


def _settings(ckpt: Checkpoint) -> Settings:
    """Return config.json of the run's arguments.

    Raises:
        ConfigError: a model that Hugging Face's code cannot compute.
    """
    args = _args(ckpt)
    if not all(type(args.get(k)) is int for k in ("hidden_size", "num_attention_heads")):
        return {}
    kind = _kind(ckpt)
    version = (ckpt.args.get("client_state") or {}).get("checkpoint_version")
    if kind != "bloom" and isinstance(version, int | float) and version < 2:
        raise ConfigError(
            f"{ckpt.path}: checkpoint_version {version}: q, k and v are fused in the order of a "
            "Megatron before 2.0, which is not translated"
        )
    lines = _Lines(ckpt, 2, 0)
    eps = args.get("layernorm_epsilon", 1e-5)
    length = args.get("max_position_embeddings") or args.get("seq_length")
    if kind == "bloom":
        after = bool(args.get("apply_residual_connection_post_layernorm"))
        return _known(
            model_type=kind, hidden_size=args["hidden_size"], n_layer=len(lines.blocks),
            n_head=args["num_attention_heads"], layer_norm_epsilon=eps,
            seq_length=args.get("seq_length"), apply_residual_connection_post_layernorm=after,
        )  # fmt: skip
    if kind == "gpt2":
        gelu = "gelu_new" if args.get("bias_gelu_fusion", True) else "gelu"
        return _known(
            model_type=kind, n_embd=args["hidden_size"], n_layer=len(lines.blocks),
            n_head=args["num_attention_heads"], n_inner=args.get("ffn_hidden_size"),
            n_positions=length, n_ctx=length, layer_norm_epsilon=eps, activation_function=gelu,
        )  # fmt: skip
    groups = args.get("num_key_value_heads") or args["num_attention_heads"]
    return _known(
        model_type=kind, hidden_size=args["hidden_size"], num_hidden_layers=len(lines.blocks),
        num_attention_heads=args["num_attention_heads"], num_key_value_heads=groups,
        head_dim=args.get("kv_channels"), intermediate_size=args.get("ffn_hidden_size"),
        max_position_embeddings=length, rms_norm_eps=eps, hidden_act="silu",
        rope_theta=float(args.get("rope_theta") or 10000.0),
        attention_bias=any(n.endswith("self_attention.dense.bias") for n in ckpt.weights),
        mlp_bias=any(n.endswith("mlp.dense_4h_to_h.bias") for n in ckpt.weights),
    )  # fmt: skip


def _known(**entries: Any) -> Settings:
    return {k: v for k, v in entries.items() if v is not None}


def _kind(ckpt: Checkpoint) -> str:
    """The model type that the tensors show.

    Raises:
        ConfigError: none that Hugging Face has.
    """

    def some(end: str) -> bool:
        return any(n.endswith(end) for n in ckpt.weights)

    if some("word_embeddings.norm.weight"):
        return "bloom"
    if some("position_embeddings.weight"):
        return "gpt2"
    args = _args(ckpt)
    if args.get("swiglu") and not some("input_layernorm.bias"):
        return "llama"
    raise ConfigError(
        f"{ckpt.path}: neither BLOOM (a norm behind the embedding), nor GPT-2 (learned positions), "
        "nor Llama (swiglu, norms without bias): no Hugging Face model computes this"
    )


def _notes(ckpt: Checkpoint) -> tuple[str, ...]:
    args = _args(ckpt)
    padded = args.get("padded_vocab_size")
    rows = {t.shape[0] for n, t in ckpt.weights.items() if n.endswith("word_embeddings.weight")}
    if ckpt.config is None and isinstance(padded, int) and padded in rows:
        return (
            f"the vocabulary has {padded} rows, as training padded it; BLOOM is published so, for "
            "the true size say --vocab-size N",
        )
    return ()


def _foreign(config: Settings) -> Settings:
    heads = config.get("num_attention_heads", config.get("n_head"))
    return {
        "hidden_size": config.get("hidden_size", config.get("n_embd")),
        "num_layers": config.get("num_hidden_layers", config.get("n_layer")),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "swiglu": config.get("model_type") == "llama",
        "rope_theta": rope_theta(config),
    }


NAMING = World(NAME, "Megatron-DeepSpeed", _variants, _settings, _foreign, notes=_notes).naming
