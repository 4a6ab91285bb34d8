"""The decoder computes what transformers' Llama computes, under the same parameter names."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mconv.errors import ConfigError  # noqa: E402
from mconv.trainer.init import materialize  # noqa: E402
from mconv.trainer.model import Decoder  # noqa: E402
from mconv.trainer.settings.model import ModelConfig  # noqa: E402

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
CASES = {
    "one kv head per query head": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped queries": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "one kv head": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "tied head": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "other constants": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-6,
    },
}


def pair(case: str) -> tuple[Decoder, torch.nn.Module]:
    config = ModelConfig(**SIZES, **CASES[case])
    model = Decoder(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))
    reference.load_state_dict(model.state_dict(), strict=True)
    return model, reference.eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str) -> None:
    model, reference = pair(case)
    ids = torch.randint(0, 97, (3, 29), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(ids), reference(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4)


def test_config_survives_transformers() -> None:
    config = ModelConfig(**SIZES, **CASES["other constants"])
    assert ModelConfig.from_hf(config.to_hf()) == config
    theirs = transformers.LlamaConfig(**config.to_hf()).to_dict()
    assert ModelConfig.from_hf(theirs) == config


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"mlp_bias": True},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
    ids=str,
)
def test_other_models_are_refused(change: dict[str, object]) -> None:
    config = ModelConfig(**SIZES, **CASES["grouped queries"]).to_hf()
    with pytest.raises(ConfigError, match="the trainer's decoder has"):
        ModelConfig.from_hf({**config, **change})


def test_initial_weights_depend_on_name_and_seed_alone() -> None:
    def built(layers: int, seed: int) -> dict[str, torch.Tensor]:
        sizes = {**SIZES, **CASES["tied head"], "num_hidden_layers": layers}
        with torch.device("meta"):
            model = Decoder(ModelConfig(**sizes))
        materialize(model, seed)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return model.state_dict()

    small, large, other = built(1, 0), built(2, 0), built(1, 1)
    assert all(torch.equal(small[name], large[name]) for name in small)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(small[name], other[name])
    assert not torch.equal(large[name], large[name.replace("0", "1")])
    assert abs(float(large[name].std()) - 0.02) < 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"hidden_size": 50}, "no even head size"),
        ({"num_hidden_layers": 0}, "at least 1"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ModelConfig(**{**SIZES, **CASES["tied head"], **change})
