"""GGUF back to Hugging Face: transformers loads the folder and gives the same logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from mconv.convert.from_gguf import from_gguf
from mconv.convert.to_gguf import to_gguf

sys.path.insert(0, str(Path(__file__).parent))
import tiny
import tiny_archs

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

FAMILIES = [
    "cohere2",
    "deepseek2-v3",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "gpt2",
    "gptneox",
    "granitemoe-shared",
    "mixtral",
    "olmo3",
    "phi3-long",
    "qwen2moe",
    "qwen3moe",
]
MODELS = {
    "llama3": "bf16",
    "llama-linear": "f32",
    "mistral": "bf16",
    "qwen2-yarn": "f32",
    "qwen3": "bf16",
}


def logits(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 500, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", [*FAMILIES, *MODELS])
def test_same_logits(tmp_path: Path, data_dir: Path, name: str) -> None:
    source = tmp_path / "m"
    source.mkdir()
    if name in MODELS:
        vocabulary = "qwen2" if "qwen" in name else "llama-bpe"
        path = data_dir / "vocab" / f"ggml-vocab-{vocabulary}.gguf"
        tiny.save_model(name, source, tiny.save_bpe(path, source, 600))
    else:
        tiny_archs.save_family(name, source, data_dir)
    kind = MODELS.get(name, "f32")
    to_gguf(source, tmp_path / "a.gguf", kind)
    report = from_gguf(tmp_path / "a.gguf", tmp_path / "out" / "m")
    assert report.differences == ()
    to_gguf(report.target, tmp_path / "b.gguf", kind)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert torch.equal(logits(source), logits(report.target))


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "llama-bpe", "spm"])
def test_tokenizer_and_generation_settings(tmp_path: Path, data_dir: Path, name: str) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    source = tmp_path / "m"
    if name == "spm":
        path = data_dir / "llama2-tokenizer.model"
        size, vectors = (
            tiny.save_spm(path, source),
            data_dir / "vocab" / "ggml-vocab-llama-spm.gguf",
        )
    else:
        vectors = data_dir / "vocab" / f"ggml-vocab-{name}.gguf"
        size = tiny.save_bpe(vectors, source)
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny.save_model("mistral", source, size, **small, intermediate_size=16)
    to_gguf(source, tmp_path / "a.gguf", "bf16")
    from_gguf(tmp_path / "a.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, ids in tiny.vectors(vectors):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
    before = AutoTokenizer.from_pretrained(source)
    assert tokenizer.encode("x", add_special_tokens=True)[:-1] == before.encode("x")[:-1]
    assert (tokenizer.eos_token, tokenizer.bos_token) == (before.eos_token, before.bos_token)
    assert tokenizer.chat_template == tiny.TEMPLATE
    end = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert end == before.eos_token_id
