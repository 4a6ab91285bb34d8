"""GPT-NeoX's names (EleutherAI): Pythia and GPT-NeoX-20B, and Llama models trained with it.

Layers are numbered from the embedding (0): blocks begin at 2, the final norm is 3 behind them, the
head 4. Hugging Face's GPT-NeoX keeps q, k and v fused as they are. With grouped queries they lie
[q | k | v], as gpt-neox has it since November 2024. Transformer Engine's modules have names of
their own (``te_mha``: ``attention.qkv``, by groups; ``te_layernorm_mlp``: ``mlp.fc1_weight``).
Source: gpt-neox ``megatron/model/``, ``tools/ckpts/convert_neox_to_hf.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World, rope_theta
from .table import Rule, rule

_FIRST = 2
_TIED = "tied_modules.embed.word_embeddings.weight"
_MARKS = (".attention.query_key_value.weight", ".attention.qkv.weight")
_ACTIVATIONS = {"swish": "silu"}


def _layers(ckpt: Checkpoint) -> int:
    """The number of blocks: one more than the largest number (of either naming)."""
    ends = (*_MARKS, ".self_attn.q_proj.weight")
    found = [n.split(".") for n in ckpt.weights if n.endswith(ends)]
    numbers = [int(w) for words in found for w in words if w.isdigit()]
    foreign = any(n.startswith(("0.", "1.", "2.", "sequential.")) for n in ckpt.weights)
    return max(numbers, default=-1) + 1 - (_FIRST if foreign else 0)


class _Lines:
    """Collects the rules of one checkpoint; blocks have numbers of their own on the two sides."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self.weights = ckpt.weights
        self.layers = _layers(ckpt)
        self.foreign = ckpt.naming == "neox"
        self.at = "sequential." if any(n.startswith("sequential.") for n in self.weights) else ""
        self.rules: list[Rule] = []

    def outer(self, embedding: str, norm: str, head: str) -> None:
        """Embedding, final norm and head."""
        last = self.layers + _FIRST
        own = f"{self.at}0.word_embeddings.weight"
        names = [_TIED, own] if _TIED in self.weights else [own]
        for name in names:
            self.rules.append(rule(name, embedding, "trim_vocab", "embedding"))
        for kind in ("weight", "scale"):
            self.rules.append(rule(f"{self.at}{last + 1}.norm.{kind}", f"{norm}.weight", "same",
                                   "final norm"))  # fmt: skip
        if f"{norm}.bias" in self.weights or self.has(f"{last + 1}.norm.bias"):
            self.rules.append(rule(f"{self.at}{last + 1}.norm.bias", f"{norm}.bias"))
        name = f"{self.at}{last + 2}.final_linear.weight"
        self.rules.append(rule(name, head, "trim_vocab", "head"))

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this place."""
        return self.at + name in self.weights

    def norms(self) -> tuple[str, ...]:
        """The norms of a block that are modules of their own."""
        first, second = "input_layernorm", "post_attention_layernorm"
        return (first,) if self.has(f"{_FIRST}.mlp.fc1_weight") else (first, second)

    def each(
        self, left: str, right: str | tuple[str, ...], how: str = "same", need: str = ""
    ) -> None:
        """One rule per block; ``{i}`` on the right is its number."""
        sides = (right,) if isinstance(right, str) else right
        for i in range(self.layers):
            name = f"{self.at}{i + _FIRST}.{left}"
            wanted = f"{need} of layer {i}" if need else ""
            self.rules.append(Rule((name,), tuple(s.format(i=i) for s in sides), how, wanted))

    def engine(self, at: str, norm: str, up: tuple[str, ...], down: str) -> None:
        """Transformer Engine's LayerNormMLP and the output of its attention."""
        pairs = [("mlp.layer_norm", (norm,)), ("mlp.fc1", up), ("mlp.fc2", (down,))]
        for left, right in pairs:
            how = "split_gate_up" if len(right) > 1 else "same"
            for kind in ("weight", "bias"):
                sides = tuple(f"{at}.{r}.{kind}" for r in right)
                need = right[0].rpartition(".")[2] if kind == "weight" else ""
                self.each(f"{left}_{kind}", sides, how, need)

    def linear(self, left: str, right: str, *, zeros: bool = False) -> None:
        """A weight and its bias; ``zeros`` where Hugging Face cannot do without one."""
        weight, bias = f"{right}.weight", f"{right}.bias"
        if zeros and self.foreign and not self.has(f"{_FIRST}.{left}.bias"):
            self.each(f"{left}.weight", (weight, bias), "same_zero_bias", right.rpartition(".")[2])
            return
        self.each(f"{left}.weight", weight, "same", right.rpartition(".")[2])
        self.each(f"{left}.bias", bias)


def _gpt_neox(ckpt: Checkpoint) -> Variant:
    lines, at = _Lines(ckpt), "gpt_neox.layers.{i}"
    lines.outer("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", "embed_out.weight")
    for norm in lines.norms():
        lines.linear(norm, f"{at}.{norm}", zeros=True)
    engine = lines.has(f"{_FIRST}.attention.qkv.weight")
    for left, right in (("qkv", "query_key_value"), ("proj", "dense")):
        lines.linear(f"attention.{left if engine else right}", f"{at}.attention.{right}")
    if lines.has(f"{_FIRST}.mlp.fc1_weight"):
        up = ("mlp.dense_h_to_4h",)
        lines.engine(at, "post_attention_layernorm", up, "mlp.dense_4h_to_h")
        return Variant("GPTNeoXForCausalLM", tuple(lines.rules))
    new = lines.has(f"{_FIRST}.mlp.linear1.weight")
    for left, right in (("linear1", "dense_h_to_4h"), ("linear2", "dense_4h_to_h")):
        lines.linear(f"mlp.{left if new else right}", f"{at}.mlp.{right}", zeros=True)
    return Variant("GPTNeoXForCausalLM", tuple(lines.rules))


def _llama(ckpt: Checkpoint, architecture: str) -> Variant:
    lines, at = _Lines(ckpt), "model.layers.{i}"
    lines.outer("model.embed_tokens.weight", "model.norm", "lm_head.weight")
    for norm in lines.norms():
        for kind in ("weight", "scale"):
            lines.each(f"{norm}.{kind}", f"{at}.{norm}.weight", "same", norm)
    how = "split_qkv_blocks" if _grouped(ckpt) else "split_qkv"
    for kind in ("weight", "bias"):
        parts = tuple(f"{at}.self_attn.{x}_proj.{kind}" for x in "qkv")
        lines.each(f"attention.query_key_value.{kind}", parts, how,
                   "q, k and v" if kind == "weight" else "")  # fmt: skip
    if lines.has(f"{_FIRST}.attention.qkv.weight"):
        for kind in ("weight", "bias"):
            parts = tuple(f"{at}.self_attn.{x}_proj.{kind}" for x in "qkv")
            lines.each(f"attention.qkv.{kind}", parts, "split_qkv",
                       "q, k and v" if kind == "weight" else "")  # fmt: skip
        lines.linear("attention.proj", f"{at}.self_attn.o_proj")
    else:
        lines.linear("attention.dense", f"{at}.self_attn.o_proj")
    if lines.has(f"{_FIRST}.mlp.fc1_weight"):
        lines.engine(at, "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"),
                     "mlp.down_proj")  # fmt: skip
    elif lines.has(f"{_FIRST}.mlp.linear1.weight"):
        both = (f"{at}.mlp.up_proj.weight", f"{at}.mlp.gate_proj.weight")
        lines.each("mlp.linear1.weight", both, "split_gate_up", "gate and up")
        lines.linear("mlp.linear2", f"{at}.mlp.down_proj")
    else:
        for left, right in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            lines.linear(f"mlp.{left}", f"{at}.mlp.{right}")
    return Variant(architecture, tuple(lines.rules))


def _grouped(ckpt: Checkpoint) -> bool:
    args, config = ckpt.args.get("neox_args") or {}, ckpt.config or {}
    heads = config.get("num_attention_heads", args.get("num_attention_heads"))
    groups = config.get("num_key_value_heads", args.get("num_kv_heads"))
    return bool(groups) and groups != heads


def _variants(ckpt: Checkpoint) -> Mapping[str, Variant]:
    return {
        "gpt_neox": _gpt_neox(ckpt),
        "llama": _llama(ckpt, "LlamaForCausalLM"),
        "mistral": _llama(ckpt, "MistralForCausalLM"),
    }


# -- settings --------------------------------------------------------------------------------------


def _settings(ckpt: Checkpoint) -> Settings:
    """Return config.json of the run's settings.

    Raises:
        ConfigError: settings that Hugging Face's models do not have.
    """
    args = ckpt.args.get("neox_args")
    if not isinstance(args, Mapping) or "gpt_j_residual" not in args:
        return {}
    if not all(type(args.get(k)) is int for k in ("hidden_size", "num_attention_heads")):
        return {}
    _refuse_others(ckpt, args)
    config: dict[str, Any] = {
        "hidden_size": args["hidden_size"],
        "num_hidden_layers": _layers(ckpt),
        "num_attention_heads": args["num_attention_heads"],
        "intermediate_size": _width(ckpt),
        "max_position_embeddings": args.get("max_position_embeddings", args.get("seq_length")),
    }
    if _is_llama(args):
        return {**config, **_llama_settings(args)}
    return config | {
        "model_type": "gpt_neox",
        "hidden_act": _activation(args),
        "rotary_pct": args.get("rotary_pct", 1.0),
        "rotary_emb_base": args.get("rotary_emb_base", 10000),
        "use_parallel_residual": bool(args["gpt_j_residual"]),
        "attention_bias": any(
            n.endswith(("attention.dense.bias", "attention.proj.bias")) for n in ckpt.weights
        ),
        "layer_norm_eps": args.get("layernorm_epsilon", 1e-5),
    }


def _is_llama(args: Settings) -> bool:
    return args.get("activation") == "swiglu" or "rmsnorm" in str(args.get("norm"))


def _llama_settings(args: Settings) -> Settings:
    window = args.get("sliding_window_width")
    found = {
        "model_type": "mistral" if window else "llama",
        "hidden_act": "silu",
        "num_key_value_heads": args.get("num_kv_heads") or args["num_attention_heads"],
        "rms_norm_eps": args.get("rms_norm_epsilon", 1e-8),
        "rope_theta": float(args.get("rotary_emb_base", 10000)),
    }
    if window:
        return found | {"sliding_window": window}
    return found | {"attention_bias": bool(args.get("use_bias_in_attn_linear", True))}


def _refuse_others(ckpt: Checkpoint, args: Settings) -> None:
    """Raise ConfigError for models that Hugging Face's code cannot compute."""
    problems = []
    if args.get("pos_emb", "learned") != "rotary":
        problems.append(f"positions are {args.get('pos_emb', 'learned')!r}, not rotary")
    if args.get("gpt_j_residual") and args.get("gpt_j_tied"):
        problems.append("attention and MLP share one norm (gpt_j_tied)")
    if _is_llama(args):
        wants = {
            "norm": "rmsnorm",
            "activation": "swiglu",
            "gpt_j_residual": False,
            "rotary_pct": 1,
        }
        problems += [
            f"a gated model with {k} = {args[k]!r}"
            for k, v in wants.items()
            if k in args and args[k] != v and args[k] != f"te_{v}"
        ]
    if problems:
        raise ConfigError(f"{ckpt.path}: no Hugging Face model does this: {'; '.join(problems)}")


def _activation(args: Settings) -> str:
    name = str(args.get("activation", "gelu"))
    if name == "gelu" and args.get("bias_gelu_fusion"):
        return "gelu_fast"
    return _ACTIVATIONS.get(name, name)


def _width(ckpt: Checkpoint) -> int | None:
    ends = ("mlp.dense_4h_to_h.weight", "mlp.linear2.weight", "mlp.w2.weight", "mlp.fc2_weight")
    return next((t.shape[1] for n, t in ckpt.weights.items() if n.endswith(ends)), None)


def _notes(ckpt: Checkpoint) -> tuple[str, ...]:
    notes = []
    known = ckpt.config is not None and "model_type" in ckpt.config
    if not known and _settings(ckpt).get("hidden_act") == "gelu_fast":
        notes.append(
            "the activation is gelu_fast, as the run's bias_gelu_fusion computed it; the hub's "
            "Pythia models say gelu: give their config.json with --config to follow them"
        )
    if _grouped(ckpt):
        notes.append(
            "q, k and v of grouped queries are taken as [q | k | v], as gpt-neox has them since "
            "November 2024"
        )
    return tuple(notes)


def _buffers(ckpt: Checkpoint) -> tuple[str, ...]:
    ends = (".rotary_emb.inv_freq", ".rotary_embeddings.inv_freq", ".attention.bias",
            ".attention.masked_bias", "._extra_state")  # fmt: skip
    return tuple(n for n in ckpt.weights if n.endswith(ends))


def _foreign(config: Settings) -> Settings:
    return {
        "neox_args": {
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_attention_heads": config["num_attention_heads"],
            "pos_emb": "rotary",
            "rotary_emb_base": config.get("rotary_emb_base") or rope_theta(config),
            "gpt_j_residual": bool(config.get("use_parallel_residual", False)),
        }
    }


NAMING = World(
    "neox", "GPT-NeoX", _variants, _settings, _foreign, left_out=_buffers, notes=_notes
).naming
