"""What encoders of BERT's layout have in common: tensor table and keys.

Only what embeddings need is kept: the pooler and the heads of pre-training are left out. Norms may
have the names of old TensorFlow checkpoints (``gamma``, ``beta``).
"""

from __future__ import annotations

from ..gguf.values import KeyValue, boolean, u32
from ._record import Config, TensorRule

#: Where the pooling that a folder asks for is put into a configuration.
POOLING = "sentence_pooling"


def norm(gguf: str, hf: str) -> tuple[TensorRule, ...]:
    """Return a LayerNorm under its new and old names."""
    names = (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta"))
    return tuple(TensorRule(f"{gguf}.{a}", f"{hf}.{b}", ("hidden",), exact=True) for a, b in names)


def encoder_keys(name: str, config: Config) -> list[KeyValue]:
    """Return that attention looks both ways, and the pooling if the folder says one."""
    return [boolean(f"{name}.attention.causal", False), *pooling_keys(name, config)]


def pooling_keys(name: str, config: Config) -> list[KeyValue]:
    """Return the pooling if the folder says one."""
    number = config.get(POOLING)
    return [] if number is None else [u32(f"{name}.pooling_type", number)]


def ignored(prefix: str) -> str:
    """Return the regular expression of tensors that embeddings do not need."""
    return (
        rf"^({prefix}\.)?(embeddings\.position_ids$|pooler\.|cls\.(predictions|seq_relationship)"
        rf"|lm_head\.)"
    )


def tensors(prefix: str, positions: str = "") -> tuple[TensorRule, ...]:
    """Return the tensor table.

    Args:
        prefix: of all names.
        positions: transform of the position embeddings.
    """
    around, layer = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{n}}"

    def matrix(gguf: str, hf: str, *shape: str) -> TensorRule:
        return TensorRule(f"blk.{{n}}.{gguf}", f"{layer}.{hf}", shape, bias="yes")

    return (
        TensorRule("token_embd", f"{around}.word_embeddings", ("vocab", "hidden")),
        TensorRule(
            "position_embd", f"{around}.position_embeddings", ("positions", "hidden"), positions,
            keep_f32=True,
        ),
        TensorRule(
            "token_types", f"{around}.token_type_embeddings", ("types", "hidden"), keep_f32=True
        ),
        *norm("token_embd_norm", f"{around}.LayerNorm"),
        matrix("attn_q", "attention.self.query", "hidden", "hidden"),
        matrix("attn_k", "attention.self.key", "hidden", "hidden"),
        matrix("attn_v", "attention.self.value", "hidden", "hidden"),
        matrix("attn_output", "attention.output.dense", "hidden", "hidden"),
        *norm("blk.{n}.attn_output_norm", f"{layer}.attention.output.LayerNorm"),
        matrix("ffn_up", "intermediate.dense", "ff", "hidden"),
        matrix("ffn_down", "output.dense", "hidden", "ff"),
        *norm("blk.{n}.layer_output_norm", f"{layer}.output.LayerNorm"),
    )  # fmt: skip


def sizes(config: Config) -> dict[str, int]:
    """Return the numbers of positions and of token types."""
    return {"positions": config["max_position_embeddings"], "types": config["type_vocab_size"]}


def first_position(config: Config) -> int:
    """Return how many rows of RoBERTa's position embeddings are not used."""
    pad = config.get("pad_token_id")
    return 0 if pad is None else 1 + int(pad)


def shifted_sizes(config: Config) -> dict[str, int]:
    """Return the sizes for models whose positions start after the padding token's id."""
    return {**sizes(config), "first_position": first_position(config)}


def shifted_keys(config: Config) -> list[KeyValue]:
    """Return the keys for those."""
    length = config["max_position_embeddings"] - first_position(config)
    return [u32("bert.context_length", length), *encoder_keys("bert", config)]
