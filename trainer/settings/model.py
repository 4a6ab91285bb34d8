"""The sizes and variants of a decoder, under the names of Hugging Face's ``config.json``.

One dataclass covers the families of ``FAMILIES``; what a family fixes (biases, query and key norms,
the offset of its norms) follows from ``model_type``, everything else is a field. Nothing here
imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from ...errors import ConfigError
from .sections import Positive, Section


@dataclass(frozen=True, slots=True)
class Family:
    """What ``model_type`` fixes."""

    architecture: str  # class of transformers
    qkv_bias: bool = False  # query, key and value have biases whatever attention_bias says
    qk_norm: bool = False  # queries and keys are normed per head
    gemma: bool = False  # norms multiply by 1 + weight, embeddings by the root of their size
    moe: bool = False  # feed-forwards are mixtures of experts
    window: bool = False  # sliding_window holds for every layer


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", window=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "gemma": Family("GemmaForCausalLM", gemma=True),
    "mixtral": Family("MixtralForCausalLM", moe=True, window=True),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True, moe=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Stretched rotary positions: ``linear``, or ``llama3`` with its two frequency bounds."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ConfigError(
                f"the trainer's decoder has no rope type {self.rope_type!r}; it has linear, llama3"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Section):
    """A decoder."""

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    model_type: Annotated[str, FAMILIES] = "llama"
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: Annotated[str, ("silu", "gelu", "gelu_pytorch_tanh")] = "silu"
    sliding_window: int | None = None  # tokens that attention sees; None for all
    num_experts: int = 0  # of every layer; 0 for a dense model
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0  # inner size of an expert; 0: intermediate_size
    norm_topk_prob: bool = True  # the chosen experts' probabilities are made to sum to 1
    router_aux_loss_coef: float = 0.0  # weight of the load balancing loss
    init_from: Path | None = None  # a checkpoint of any format to start from

    def check(self) -> None:
        self._check_heads()
        self._check_experts()

    def _check_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ConfigError(
                f"model.num_attention_heads={heads} is not a multiple of num_key_value_heads="
                f"{kv_heads}"
            )
        if not self.head_dim and self.hidden_size % heads == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if not self.head_dim or self.head_dim % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} over num_attention_heads={heads} gives no "
                "even head size, which rotary positions need; set model.head_dim"
            )

    def _check_experts(self) -> None:
        if self.family.moe != bool(self.num_experts):
            wanted = "needs model.num_experts" if self.family.moe else "has no experts"
            raise ConfigError(f"model.model_type={self.model_type!r} {wanted}")
        if self.num_experts:
            if not 1 <= self.num_experts_per_tok <= self.num_experts:
                raise ConfigError(
                    f"model.num_experts_per_tok={self.num_experts_per_tok} must be between 1 and "
                    f"num_experts={self.num_experts}"
                )
            if not self.moe_intermediate_size:
                object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)

    @property
    def family(self) -> Family:
        """What ``model_type`` fixes."""
        return FAMILIES[self.model_type]

    def to_hf(self, **more: Any) -> dict[str, Any]:
        """Return the ``config.json`` of the family; ``more`` adds or replaces keys."""
        values = asdict(self)
        del values["init_from"]
        if not self.family.moe:
            values = {k: v for k, v in values.items() if k not in _MOE_KEYS}
        elif self.model_type == "mixtral":
            values["num_local_experts"] = values.pop("num_experts")
            values["intermediate_size"] = values.pop("moe_intermediate_size")
            del values["norm_topk_prob"]
        elif self.model_type == "qwen3_moe":
            values |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        if self.model_type == "llama":
            values["mlp_bias"] = False
        if self.family.gemma:
            values["hidden_activation"] = self.hidden_act
        if not self.family.window:
            del values["sliding_window"]
            values["use_sliding_window"] = False
        return {"architectures": [self.family.architecture], **values, **more}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **more: Any) -> ModelConfig:
        """Read the sizes of a ``config.json``; ``more`` replaces fields.

        Raises:
            ConfigError: another architecture or a variant that the decoder lacks, or a size is
                missing.
        """
        kind = config.get("model_type", "llama")
        if kind not in FAMILIES:
            raise ConfigError(
                f"config.json: model_type is {kind!r}; the trainer's decoder has "
                f"{', '.join(FAMILIES)}"
            )
        for key, value in _FIXED.items():
            if config.get(key, value) not in (value, None):
                raise ConfigError(
                    f"config.json: {key} is {config[key]!r}; the trainer's decoder has {value!r}"
                )
        known = {f.name for f in fields(cls)} - {"rope_theta", "rope_scaling", "init_from"}
        values = {k: config[k] for k in known if config.get(k) is not None}
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        if "num_experts" not in values and "num_local_experts" in config:
            values["num_experts"] = config["num_local_experts"]
        if kind == "mixtral":
            values["moe_intermediate_size"] = values.get("intermediate_size")
            values["norm_topk_prob"] = True
        if not FAMILIES[kind].moe:
            values = {k: v for k, v in values.items() if k not in _MOE_KEYS}
        if not FAMILIES[kind].window:
            values.pop("sliding_window", None)
        if FAMILIES[kind].gemma:
            values["hidden_act"] = config.get("hidden_activation") or "gelu_pytorch_tanh"
            values.setdefault("tie_word_embeddings", True)
        values |= _rope(config) | more
        for field in fields(cls):
            if field.default is MISSING and not values.get(field.name):
                raise ConfigError(f"config.json: {field.name!r} is missing")
        return cls(**values)


_MOE_KEYS = {
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
}
#: Settings that the decoder would silently ignore, with the only value that it has.
_FIXED: dict[str, Any] = {
    "mlp_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling``, from where old and new files have them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    values = {f.name: rope[f.name] for f in fields(RopeScaling) if f.name in rope}
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**values | {"rope_type": kind})}
