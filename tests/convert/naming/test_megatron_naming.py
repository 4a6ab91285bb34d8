"""HF <-> Megatron on whole models: truths of the fixtures taken both ways, families without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.naming import from_hf, namings, to_hf
from mconv.convert.naming._megatron_families import FAMILIES
from mconv.errors import ConfigError
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.tensor import LazyTensor, from_array
from safetensors.numpy import load_file

CASES = [
    "deepseek_tp2ep2", "gpt2_tp2pp2", "llama_tied_tp2pp2", "llama_tp1pp1", "mixtral_ep2",
    "qwen2_bias_tp2", "qwen3moe_tp2ep2pp2",
]  # fmt: skip


def truth_checkpoint(case: Path) -> Checkpoint:
    """The case's truth as a Hugging Face checkpoint."""
    return Checkpoint(
        path=case,
        format="hf",
        weights={n: from_array(a) for n, a in load_file(case / "truth.safetensors").items()},
        config=json.loads((case / "config.json").read_text()),
    )


@pytest.mark.parametrize("name", CASES)
def test_from_hf_gives_what_megatron_wrote(fixtures_dir: Path, name: str) -> None:
    case = fixtures_dir / "megatron" / name
    written = open_checkpoint(case / "torch")
    rows = written.weights["embedding.word_embeddings.weight"].shape[0]
    made = from_hf(truth_checkpoint(case), "megatron", padded_vocab_size=rows)
    assert set(made.weights) == set(written.weights)
    for key, tensor in made.weights.items():
        a, b = tensor.read(), written.weights[key].read()
        true_rows = 317 if "word_embeddings" in key or "output_layer" in key else None
        assert np.array_equal(a[:true_rows], b[:true_rows]), key
        assert true_rows is None or not a[true_rows:].any()
    for key, value in made.args.items():
        if key in ("padded_vocab_size", "max_position_embeddings"):
            continue
        wrote = written.args.get(key)
        if key == "num_query_groups" and not written.args["group_query_attention"]:
            continue  # a meaningless default there
        if key in ("ffn_hidden_size", "moe_ffn_hidden_size", "kv_channels") or wrote is None:
            continue  # several settings hold the same number
        assert wrote == value, key
    hf = truth_checkpoint(case)
    again = to_hf(made)
    assert set(again.weights) == set(hf.weights)
    assert all(np.array_equal(t.read(), hf.weights[n].read()) for n, t in again.weights.items())


def test_hf_passes_through(fixtures_dir: Path) -> None:
    ckpt = truth_checkpoint(fixtures_dir / "megatron" / "llama_tp1pp1")
    assert to_hf(ckpt) is ckpt
    assert from_hf(ckpt, "hf") is ckpt


def test_unknown_worlds_and_models_are_refused(fixtures_dir: Path) -> None:
    ckpt = truth_checkpoint(fixtures_dir / "megatron" / "llama_tp1pp1")
    assert "megatron" in namings()
    with pytest.raises(ConfigError, match="did you mean 'megatron'"):
        from_hf(ckpt, "megatorn")
    with pytest.raises(ConfigError, match="did you mean 'qwen2'"):
        from_hf(replace(ckpt, config={**(ckpt.config or {}), "model_type": "qwen22"}), "megatron")
    with pytest.raises(ConfigError, match=r"config\.json"):
        from_hf(replace(ckpt, config=None), "megatron")


def test_qwen2_moe_with_a_gated_shared_expert() -> None:
    """No fixture has it: names after the model's code, shapes by hand."""
    h, f, s, experts = 8, 4, 6, 2

    def rand(*shape: int) -> LazyTensor:
        rng = np.random.default_rng(int(np.prod(shape)))
        return from_array(rng.normal(size=shape).astype(np.float32))

    at = "decoder.layers.0."
    weights = {
        "embedding.word_embeddings.weight": rand(10, h),
        f"{at}input_layernorm.weight": rand(h),
        f"{at}self_attention.linear_proj.weight": rand(h, h),
        f"{at}self_attention.linear_qkv.weight": rand(3 * h, h),
        f"{at}self_attention.linear_qkv.bias": rand(3 * h),
        f"{at}pre_mlp_layernorm.weight": rand(h),
        f"{at}mlp.router.weight": rand(experts, h),
        f"{at}mlp.shared_experts.linear_fc1.weight": rand(2 * s, h),
        f"{at}mlp.shared_experts.linear_fc2.weight": rand(h, s),
        f"{at}mlp.shared_experts.gate_weight": rand(1, h),
        "decoder.final_layernorm.weight": rand(h),
        "output_layer.weight": rand(10, h),
        "mtp.layers.0.eh_proj.weight": rand(h, 2 * h),
    }
    for e in range(experts):
        weights[f"{at}mlp.experts.local_experts.{e}.linear_fc1.weight"] = rand(2 * f, h)
        weights[f"{at}mlp.experts.local_experts.{e}.linear_fc2.weight"] = rand(h, f)
    args = {
        "num_layers": 1, "hidden_size": h, "num_attention_heads": 2, "kv_channels": 4,
        "group_query_attention": False, "num_query_groups": 1, "ffn_hidden_size": 4 * h,
        "moe_ffn_hidden_size": f, "num_experts": experts, "moe_router_topk": 2,
        "moe_shared_expert_intermediate_size": s, "moe_router_pre_softmax": True,
        "rotary_base": 1e6, "layernorm_epsilon": 1e-6, "max_position_embeddings": 64,
    }  # fmt: skip
    ckpt = Checkpoint(
        path=Path("x"), format="megatron", naming="megatron", weights=weights, args=args
    )
    hf = to_hf(ckpt, vocab_size=9)
    assert hf.config is not None
    assert hf.config["model_type"] == "qwen2_moe"
    assert hf.config["norm_topk_prob"] is False
    assert hf.config["num_key_value_heads"] == 2
    assert hf.weights["model.layers.0.mlp.shared_expert.gate_proj.weight"].shape == (s, h)
    assert hf.weights["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, h)
    assert hf.weights["model.layers.0.mlp.experts.1.down_proj.weight"].shape == (h, f)
    assert any("mtp.layers.0.eh_proj" in w for w in hf.warnings)
    with pytest.raises(ConfigError, match="--config"):
        to_hf(replace(ckpt, weights={"embedding.word_embeddings.weight": rand(10, h)}))


def test_rotary_settings_reach_the_config(fixtures_dir: Path) -> None:
    ckpt = open_checkpoint(fixtures_dir / "megatron" / "llama_tp1pp1" / "torch")
    plain = replace(ckpt, config=None)

    def scaling(**args: object) -> object:
        hf = to_hf(replace(plain, args={**ckpt.args, **args}), vocab_size=317)
        return (hf.config or {}).get("rope_scaling")

    assert scaling() is None
    assert scaling(rotary_seq_len_interpolation_factor=4) == {"rope_type": "linear", "factor": 4.0}
    llama3 = scaling(use_rope_scaling=True, rope_scaling_factor=32.0)
    assert isinstance(llama3, dict)
    assert (llama3["rope_type"], llama3["factor"]) == ("llama3", 32.0)
    with pytest.raises(ConfigError, match="gated attention"):
        scaling(attention_output_gate=True)


def test_interleaved_rotary_rows_are_unpaired(fixtures_dir: Path) -> None:
    ckpt = open_checkpoint(fixtures_dir / "megatron" / "llama_tp1pp1" / "torch")
    paired = replace(ckpt, args={**ckpt.args, "rotary_interleaved": True})
    name = "model.layers.0.self_attn.q_proj.weight"
    halves = to_hf(ckpt, vocab_size=317).weights[name].read()
    heads = (ckpt.config or {})["num_attention_heads"]
    d = halves.shape[0] // heads
    expected = halves.reshape(heads, d // 2, 2, -1).transpose(0, 2, 1, 3).reshape(halves.shape)
    assert np.array_equal(to_hf(paired, vocab_size=317).weights[name].read(), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_tables_are_unambiguous(family: object) -> None:
    """No two lines of a family claim the same name, on either side."""
    for side in ("left", "right"):
        names = [n for r in family.rules for n in getattr(r, side)]  # type: ignore[attr-defined]
        assert len(names) == len(set(names))
