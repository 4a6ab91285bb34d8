"""LitGPT models with their model_config.yaml alone: names, values and logits of every family.

The LitGPT side is written here from litgpt's own description of its modules; the Hugging Face side
is a model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mconv.convert.naming import from_hf, to_hf
from mconv.convert.reshard import reshard
from mconv.errors import ConfigError
from mconv.shardio import Layout
from mconv.shardio.registry import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HEADS, KV, WIDTH, HEAD, INNER, LAYERS, EXPERTS, ROWS = 4, 2, 32, 16, 48, 2, 3, 64
SHARED = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "head_dim": HEAD, "intermediate_size": INNER, "vocab_size": ROWS,
    "max_position_embeddings": 128, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# all fields of litgpt's Config, as save_config writes them
LIT: dict[str, Any] = {
    "attention_logit_softcapping": None, "attention_scores_scalar": None, "attn_bias": False,
    "bias": False, "block_size": 128, "final_logit_softcapping": None,
    "first_k_dense_replace": None, "gelu_approximate": "none", "head_size": HEAD,
    "hf_config": {"name": "x", "org": "y"}, "intermediate_size": INNER, "latent_attention": None,
    "lm_head_bias": False, "mlp_class_name": "LLaMAMLP", "moe_intermediate_size": None,
    "n_embd": WIDTH, "n_expert": 0, "n_expert_groups": None, "n_expert_per_token": 0,
    "n_head": HEADS, "n_layer": LAYERS, "n_query_groups": KV, "n_shared_expert": None,
    "n_topk_groups": None, "n_topk_scores_per_group": None, "name": "x", "norm_1": True,
    "norm_2": True, "norm_class_name": "RMSNorm", "norm_eps": 1e-05, "norm_qk": False,
    "norm_qk_type": "default", "norm_topk_prob": False, "padded_vocab_size": ROWS,
    "padding_multiple": 64, "parallel_residual": False, "post_attention_norm": False,
    "post_mlp_norm": False, "rope_adjustments": None, "rope_base": 10000,
    "rope_condense_ratio": 1, "rope_indices": None, "rope_interleave": False,
    "rope_local_base_freq": None, "rotary_percentage": 1.0, "routed_scaling_factor": 1.0,
    "scale_embeddings": False, "shared_attention_norm": False, "sliding_window_indices": None,
    "sliding_window_size": None, "vocab_size": 60,
}  # fmt: skip
STRETCH = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MOE = {"mlp_class_name": "LLaMAMoE", "n_expert": EXPERTS, "n_expert_per_token": 2}
EPS = {"rms_norm_eps": 1e-5}
# name -> (litgpt's fields, transformers' class, its settings)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama3": (
        {"rope_base": 500000, "rope_adjustments": {**STRETCH, "original_max_seq_len": 32}},
        "Llama",
        {**EPS, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **STRETCH,
                                    "original_max_position_embeddings": 32}},
    ),
    "llama-linear": (
        {"rope_condense_ratio": 4, "norm_eps": 1e-06}, "Llama",
        {"rms_norm_eps": 1e-6,
         "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": (
        {"name": "Mistral-7B-v0.1", "sliding_window_size": 4, "sliding_window_indices": [1, 1]},
        "Mistral", {**EPS, "sliding_window": 4},
    ),
    "mixtral": (
        MOE, "Mixtral",
        {**EPS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": None,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "qwen2": ({"attn_bias": True, "norm_eps": 1e-06}, "Qwen2", {"rms_norm_eps": 1e-6}),
    "qwen3": ({"norm_qk": True}, "Qwen3", EPS),
    "qwen3_moe": (
        {**MOE, "norm_qk": True, "moe_intermediate_size": 24}, "Qwen3Moe",
        {**EPS, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "norm_topk_prob": True},
    ),
    "gemma2": (
        {"name": "Gemma-2-2b", "mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh",
         "post_attention_norm": True, "post_mlp_norm": True, "scale_embeddings": True,
         "attention_scores_scalar": 20, "attention_logit_softcapping": 5.0,
         "final_logit_softcapping": 3.0, "sliding_window_size": 4,
         "sliding_window_indices": [1, 0]},
        "Gemma2",
        {**EPS, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 3.0, "sliding_window": 4},
    ),
    "phi3": (
        {"name": "Phi-3-mini-4k-instruct", "sliding_window_size": 4,
         "sliding_window_indices": [1, 1], "n_query_groups": HEADS, "head_size": 8},
        "Phi3", {**EPS, "sliding_window": 4, "num_key_value_heads": HEADS, "head_dim": 8},
    ),
    "gpt_neox": (
        {"name": "pythia-14m", "mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm",
         "bias": True, "parallel_residual": True, "rotary_percentage": 0.25, "head_size": 8,
         "n_query_groups": HEADS},
        "GPTNeoX",
        {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                             "partial_rotary_factor": 0.25}},
    ),
}  # fmt: skip
# litgpt's module -> Hugging Face's, in a layer
PLAIN = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm",
         "attn.proj": "self_attn.o_proj", "attn.norm_q": "self_attn.q_norm",
         "attn.norm_k": "self_attn.k_norm", "mlp.fc_1": "mlp.gate_proj",
         "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
         "mlp.gate": "mlp.gate"}  # fmt: skip
SPARSE = "block_sparse_moe.gate."  # Mixtral's router
GEMMA = {**PLAIN, "norm_2": "pre_feedforward_layernorm",
         "post_attention_norm": "post_attention_layernorm",
         "post_mlp_norm": "post_feedforward_layernorm"}  # fmt: skip
NEOX = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm",
        "attn.proj": "attention.dense", "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h"}  # fmt: skip
Arrays = dict[str, np.ndarray]


def _outer(m: Arrays) -> Arrays:
    ends = {"embed_tokens": "transformer.wte", "embed_in": "transformer.wte",
            "model.norm": "transformer.ln_f", "final_layer_norm": "transformer.ln_f",
            "lm_head": "lm_head", "embed_out": "lm_head"}  # fmt: skip
    return {
        f"{lit}.{name.rpartition('.')[2]}": value
        for name, value in m.items()
        for end, lit in ends.items()
        if name.rpartition(".")[0].endswith(end)
    }


def _lit_model(family: str, m: Arrays) -> Arrays:
    """The weights of a transformers model as litgpt's modules hold them."""
    out = _outer(m)
    names = {"gemma2": GEMMA, "gpt_neox": NEOX}.get(family, PLAIN)
    for i in range(LAYERS):
        at = f"gpt_neox.layers.{i}" if family == "gpt_neox" else f"model.layers.{i}"
        to = f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            for lit, hf in names.items():
                for name in (f"{at}.{hf}.{kind}", f"{at}.{hf}.{kind}".replace("mlp.gate.", SPARSE)):
                    if name in m:
                        out[f"{to}.{lit}.{kind}"] = m[name]
            fused = _fused(m, at, kind)
            if fused is not None:
                out[f"{to}.attn.qkv.{kind}"] = fused
        if f"{at}.mlp.gate_up_proj.weight" in m:
            gate, up = np.split(m[f"{at}.mlp.gate_up_proj.weight"], 2)
            out |= {f"{to}.mlp.fc_1.weight": gate, f"{to}.mlp.fc_2.weight": up}
        for e in range(EXPERTS):
            for lit, theirs in (("fc_1", ("w1", "gate_proj")), ("fc_2", ("w3", "up_proj")),
                                ("proj", ("w2", "down_proj"))):  # fmt: skip
                for mlp, part in zip(("block_sparse_moe", "mlp"), theirs, strict=True):
                    name = f"{at}.{mlp}.experts.{e}.{part}.weight"
                    if name in m:
                        out[f"{to}.mlp.experts.{e}.{lit}.weight"] = m[name]
    return out


def _fused(m: Arrays, at: str, kind: str) -> np.ndarray | None:
    """All queries, then all keys, then all values."""
    one = m.get(f"{at}.self_attn.qkv_proj.{kind}")
    groups = m.get(f"{at}.attention.query_key_value.{kind}")
    if groups is not None:  # per head: q, k, v
        per_head = groups.reshape(HEADS, 3, -1, *groups.shape[1:])
        return per_head.swapaxes(0, 1).reshape(groups.shape)
    apart = [m.get(f"{at}.self_attn.{x}_proj.{kind}") for x in "qkv"]
    return one if apart[0] is None else np.concatenate(apart)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Arrays]]:
    """LitGPT's folder, the model of transformers, its weights as its checkpoint has them."""
    found: dict[str, tuple[Path, Any, Arrays]] = {}

    def make(case: str) -> tuple[Path, Any, Arrays]:
        if case not in found:
            found[case] = _make(case, tmp_path_factory.mktemp(case))
        return found[case]

    return make


def _make(case: str, folder: Path) -> tuple[Path, Any, Arrays]:
    from safetensors.numpy import load_file

    fields, kind, settings = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**{**SHARED, **settings})
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    model.save_pretrained(folder / "hf")
    weights = load_file(folder / "hf" / "model.safetensors")
    lit = folder / "lit"
    lit.mkdir()
    mine = _lit_model(config.model_type, weights)
    torch.save({n: torch.from_numpy(a.copy()) for n, a in mine.items()}, lit / "lit_model.pth")
    (lit / "model_config.yaml").write_text(yaml.dump({**LIT, **fields}))
    return lit, model, weights


@pytest.mark.parametrize("case", CASES)
def test_names_values_and_logits(case: str, made: Any, tmp_path: Path) -> None:
    lit, model, weights = made(case)
    found = to_hf(open_checkpoint(lit))
    assert found.config is not None
    assert found.config["model_type"] == model.config.model_type
    assert any("lm_head" in line for line in found.warnings) == (case == "gemma2")
    assert found.weights.keys() == weights.keys()
    assert all(np.array_equal(t.read(), weights[n]) for n, t in found.weights.items())
    reshard(lit, tmp_path / "out", Layout("hf"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[5, 17, 9, 3, 44, 21, 60, 2, 33, 7, 11, 52] * 4])
    with torch.no_grad():
        mine, truth = (one(tokens).logits for one in (again, model))
    assert torch.allclose(mine, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["gpt_neox", "gemma2", "phi3", "qwen3_moe"])
def test_there_and_back(case: str, made: Any) -> None:
    lit, _, _ = made(case)
    own = open_checkpoint(lit)
    back = from_hf(to_hf(own), "litgpt")
    assert back.weights.keys() == own.weights.keys()
    assert all(np.array_equal(t.read(), own.weights[n].read()) for n, t in back.weights.items())


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nn_head: *c\nn_layer: 2\nn_embd: 8\n"
REFUSED = {
    "not a table": "- 1\n",
    "not YAML": "a: [1\n",
    "code": "!!python/object/apply:os.system [echo]\n",
    "laughs": LAUGHS,
    "heads": yaml.dump({**LIT, "n_head": 3}),
    "text": yaml.dump({**LIT, "n_layer": "two"}),
    "huge": yaml.dump(LIT).replace("n_layer: 2", "n_layer: 0x" + "f" * 9000),
    "infinite": yaml.dump({**LIT, "norm_eps": float("inf")}),
    "latent": yaml.dump({**LIT, "latent_attention": {"q_lora_rank": 1}}),
    "parallel": yaml.dump({**LIT, "parallel_residual": True}),
    "yarn": yaml.dump({**LIT, "rope_adjustments": {"factor": 4.0, "beta_fast": 32}}),
    "another MLP": yaml.dump({**LIT, "mlp_class_name": "Other"}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_other_settings_are_refused(why: str, made: Any, tmp_path: Path) -> None:
    lit, _, _ = made("qwen3")
    (tmp_path / "lit_model.pth").write_bytes((lit / "lit_model.pth").read_bytes())
    (tmp_path / "model_config.yaml").write_text(REFUSED[why])
    with pytest.raises(ConfigError, match=r"model_config\.yaml"):
        to_hf(open_checkpoint(tmp_path))


def test_a_config_of_the_model_comes_first(made: Any, tmp_path: Path) -> None:
    lit, model, _ = made("qwen3")
    (tmp_path / "lit_model.pth").write_bytes((lit / "lit_model.pth").read_bytes())
    (tmp_path / "model_config.yaml").write_text("- 1\n")
    model.config.save_pretrained(tmp_path)
    found = to_hf(open_checkpoint(tmp_path))
    assert found.config is not None
    assert found.config["max_position_embeddings"] == 128
