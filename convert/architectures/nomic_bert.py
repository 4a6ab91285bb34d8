"""nomic-embed-text v1 and v1.5 (``general.architecture`` = ``nomic-bert``): rotary BERT, gated MLP.

Names are those of the hub's own code, with a fused q|k|v. Rotary embedding in halves.
"""

from __future__ import annotations

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._bert_like import encoder_keys, ignored, norm
from ._record import Architecture, Config, TensorRule

_LAYER = "bert.encoder.layers.{n}"
#: What llama.cpp's graph assumes.
_FIXED = {
    "activation_function": "swiglu",
    "causal": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "prenorm": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}
#: Positions that the configuration names, and those that the models were trained with.
_STATED, _TRAINED = 8192, 2048


def _extra_keys(config: Config) -> list[KeyValue]:
    for key, want in _FIXED.items():
        if config.get(key, want) != want:
            raise UnsupportedError(
                f"config.json: {key} is {config[key]!r}, llama.cpp runs {want!r}"
            )
    if (config["n_positions"], config["max_trained_positions"]) != (_STATED, _TRAINED):
        raise UnsupportedError(
            "config.json: n_positions is not that of nomic-embed-text v1 or v1.5"
        )
    return [
        u32("nomic-bert.context_length", _TRAINED),
        *encoder_keys("nomic-bert", config),
    ]


def _matrix(gguf: str, hf: str, *shape: str) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.{hf}", shape)


ARCHITECTURE = Architecture(
    name="nomic-bert",
    classes=("NomicBertModel",),
    headless=("NomicBertModel",),
    prefix="bert.",
    rope="neox",
    defaults={
        "nomic_bert": {
            "vocab_size": 30528,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": 3072,
            "n_positions": 8192,
            "max_trained_positions": 2048,
            "layer_norm_epsilon": 1e-12,
            "rotary_emb_base": 1000.0,
            "type_vocab_size": 2,
        },
    },
    synonyms={"n_embd": "hidden_size", "n_head": "num_attention_heads"},
    sizes=lambda config: {"ff": config["n_inner"], "types": config["type_vocab_size"]},
    ignored=ignored("bert"),
    extra_keys=_extra_keys,
    tokenizer=TokenizerRule(kinds=("wordpiece",), token_types=True),
    tensors=(
        TensorRule("token_embd", "bert.embeddings.word_embeddings", ("vocab", "hidden")),
        TensorRule(
            "token_types", "bert.embeddings.token_type_embeddings", ("types", "hidden"),
            keep_f32=True,
        ),
        *norm("token_embd_norm", "bert.emb_ln"),
        _matrix("attn_qkv", "attn.Wqkv", "qkv", "hidden"),
        _matrix("attn_output", "attn.out_proj", "hidden", "hidden"),
        *norm("blk.{n}.attn_output_norm", f"{_LAYER}.norm1"),
        _matrix("ffn_up", "mlp.fc11", "ff", "hidden"),
        _matrix("ffn_gate", "mlp.fc12", "ff", "hidden"),
        _matrix("ffn_down", "mlp.fc2", "hidden", "ff"),
        *norm("blk.{n}.layer_output_norm", f"{_LAYER}.norm2"),
    ),
    notes="v1 and v1.5, in the names of the hub; embeddings only",
)  # fmt: skip
