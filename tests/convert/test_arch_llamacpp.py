"""Tiny models of the families in the real llama.cpp: its logits are those of transformers.

A few families by default, since the golden files already hold the others to the same bytes; all
with ``MCONV_TEST_ARCHS=all``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.to_gguf import to_gguf

sys.path.insert(0, str(Path(__file__).parent))
import tiny_archs
from llamacpp import LlamaCpp

pytest.importorskip("xllamacpp")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

#: The last is longer than the windows.
PROMPTS = [[42], [5, 17, 99, 3], [*range(300, 348)]]
ENCODERS = ("bert", "roberta", "xlm-roberta")
#: What llama.cpp, or this way of asking it, does not run.
UNRUN = {
    "gemma3n": "it wants keys and values of all layers, transformers leaves out unused ones",
    "t5": "its server has no encoder",
    "t5-gated": "its server has no encoder",
    "bitnet": "refused: transformers' BitNet has a squared ReLU",
}
ALL = [
    name
    for name, family in tiny_archs.FAMILIES.items()
    if not (family.made or family.mxfp4 or name in ENCODERS or name in UNRUN)
]
FEW = [
    "mixtral", "phi3-long", "deepseek2-v3", "granitemoe-shared", "gpt-oss", "mistral3",
    "qwen35moe", "mamba2",
]  # fmt: skip
CHOSEN = ALL if os.environ.get("MCONV_TEST_ARCHS") == "all" else FEW
#: Share of the range of the logits; llama.cpp rounds the ramp of yarn, gpt-oss does not.
CLOSE, LOOSE = 1e-3, {"gpt-oss": 5e-3}


def saved(name: str, folder: Path, data: Path) -> Any:
    """Save a tiny model and load it as a user would."""
    made = tiny_archs.save_family(name, folder, data)
    return type(made).from_pretrained(folder, dtype=torch.float32).eval()


def log_probabilities(model: Any, prompt: list[int]) -> np.ndarray:
    with torch.no_grad():
        last = model(torch.tensor([prompt])).logits[0, -1]
    return np.asarray(torch.log_softmax(last.double(), -1).numpy())


def assert_close(ours: np.ndarray, theirs: np.ndarray, share: float = CLOSE) -> None:
    assert np.abs(ours - theirs).max() <= share * (theirs.max() - theirs.min())


@pytest.mark.parametrize("name", CHOSEN)
def test_logits(tmp_path: Path, data_dir: Path, name: str) -> None:
    model = saved(name, tmp_path / "m", data_dir)
    to_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")
    runner = LlamaCpp(tmp_path / "m.gguf")
    size = model.config.get_text_config().vocab_size
    for prompt in PROMPTS:
        said = runner.log_probabilities(prompt, size)
        assert_close(said, log_probabilities(model, prompt), LOOSE.get(name, CLOSE))


@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings(tmp_path: Path, data_dir: Path, name: str) -> None:
    model = saved(name, tmp_path / "m", data_dir)
    to_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")
    runner = LlamaCpp(tmp_path / "m.gguf", embedding=True)
    for prompt in ([42], [5, 17, 99, 13]):
        with torch.no_grad():
            states = model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        assert_close(runner.embeddings(prompt), states)


def as_llama(name: str, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of a family under Llama's names."""
    out = {}
    for key, value in weights.items():
        layer = key.rpartition(".weight")[0].rpartition(".layers.")[2].partition(".")[0]
        at = f"model.layers.{layer}"
        if name == "baichuan" and "W_pack" in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[f"{at}.self_attn.{part}_proj.weight"] = rows
        elif name == "internlm2" and "wqkv" in key:
            view = value.reshape(2, 4, 16, 64)  # two groups of two queries, a key and a value
            parts = {"q": view[:, :2], "k": view[:, 2], "v": view[:, 3]}
            for part, rows in parts.items():
                out[f"{at}.self_attn.{part}_proj.weight"] = rows.reshape(-1, 64)
        else:
            for theirs, ours in INTERNLM2.items():
                key = key.replace(theirs, ours) if name == "internlm2" else key
            out[key] = value
    return out


INTERNLM2 = {
    "tok_embeddings": "embed_tokens", "output.weight": "lm_head.weight",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


@pytest.mark.parametrize("name", ["internlm2", "baichuan", "minicpm"])
def test_families_of_llama_that_transformers_does_not_know(
    tmp_path: Path, data_dir: Path, name: str
) -> None:
    import transformers
    from safetensors.torch import load_file

    record = tiny_archs.made_record(tiny_archs.FAMILIES[name], tmp_path / "v", data_dir)
    tiny_archs.write_recorded(record, tmp_path / "m", data_dir, name)
    to_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")
    config = {k: v for k, v in record["config"].items() if k not in ("architectures", "model_type")}
    if name == "minicpm":  # Granite has the same scales
        scales = {
            "embedding_multiplier": config["scale_emb"],
            "residual_multiplier": config["scale_depth"] / 2**0.5,
            "logits_scaling": config["hidden_size"] / config["dim_model_base"],
            "attention_multiplier": 16**-0.5,
        }
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**config, **scales))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    weights = load_file(tmp_path / "m" / "model.safetensors")
    model.load_state_dict({k: v.float() for k, v in as_llama(name, weights).items()})
    runner = LlamaCpp(tmp_path / "m.gguf")
    for prompt in PROMPTS:
        said = runner.log_probabilities(prompt, config["vocab_size"])
        assert_close(said, log_probabilities(model.eval(), prompt))
