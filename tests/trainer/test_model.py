"""The decoder computes what transformers computes, for every family."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mconv.trainer.model import Decoder  # noqa: E402
from mconv.trainer.settings.model import ModelConfig  # noqa: E402

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "head_dim": 16},
    "llama 3.1": {"rope_scaling": SCALING, "rope_theta": 500000.0},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "head_dim": 10},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rms_norm_eps": 1e-6},
    "gemma": {
        "model_type": "gemma",
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "mixtral": {"model_type": "mixtral", **EXPERTS},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 32,
        **EXPERTS,
    },
    "qwen3_moe without norm": {"model_type": "qwen3_moe", **EXPERTS, "norm_topk_prob": False},
}


def transformers_model(model: Decoder) -> torch.nn.Module:
    """The same model in transformers, eager attention, weights loaded by name."""
    settings = transformers.AutoConfig.for_model(**model.config.to_hf())
    reference = transformers.AutoModelForCausalLM.from_config(settings)
    state = {}
    for name, value in model.state_dict().items():
        if ".experts." not in name:
            state[name.replace("block_sparse_moe", "mlp")] = value
    for name, layer in model.model.layers.items():
        if model.config.num_experts:
            experts = layer.feed_forward.experts
            stem = f"model.layers.{name}.mlp.experts."
            state[stem + "gate_up_proj"] = torch.cat((experts.gate_proj, experts.up_proj), 1)
            state[stem + "down_proj"] = experts.down_proj
    reference.load_state_dict(state, strict=True)
    return reference.eval()


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_equal_transformers(case: str) -> None:
    config = ModelConfig.from_hf({**SIZES, **HEADS, **FAMILIES[case]})
    model = Decoder(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    reference = transformers_model(model)
    ids = torch.randint(0, 97, (3, 29), generator=generator)
    ours, theirs = model(ids), reference(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ModelConfig.from_hf(reference.config.to_dict()) == config
