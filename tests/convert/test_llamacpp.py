"""Converted models in the real llama.cpp: the same greedy tokens as transformers, the same ids.

Random models get large weights so that the most likely token is clear; one model is trained a
little on real text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mconv.convert.to_gguf import to_gguf

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from llamacpp import LlamaCpp

pytest.importorskip("xllamacpp")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

KEEP = 600
NEW = 24
PROMPTS = [[5, 17, 99, 3], [300, 301, 302, 303, 304, 305, 306, 307], [42]]


def continuation(model: Any, prompt: list[int], banned: range) -> list[int]:
    """Return transformers' greedy continuation in F32, without the end-of-text tokens."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0, suppress_tokens=list(banned),
        )  # fmt: skip
    return list(out[0, len(prompt) :].tolist())


def reload(folder: Path) -> Any:
    """Load a saved model in F32: casting one in memory leaves rounded rotary frequencies."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def enlarge(model: Any) -> None:
    """Give the matrices standard deviations that make a random network's choices clear."""
    torch.manual_seed(11)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, 0.0, 0.25)


@pytest.mark.parametrize("name", list(tiny.MODELS))
def test_greedy_tokens_of_every_family(tmp_path: Path, data_dir: Path, name: str) -> None:
    folder = tmp_path / "m"
    vocab = "qwen2" if "qwen" in name else "llama-bpe"
    size = tiny.save_bpe(data_dir / "vocab" / f"ggml-vocab-{vocab}.gguf", folder, KEEP)
    model = tiny.save_model(name, folder, size)
    enlarge(model)
    model.save_pretrained(folder)
    model = reload(folder)
    to_gguf(folder, tmp_path / "m.gguf", "f32")
    runner = LlamaCpp(tmp_path / "m.gguf")
    banned = range(KEEP, size)
    for prompt in PROMPTS:
        assert runner.greedy(prompt, NEW, banned) == continuation(model, prompt, banned)


def train(model: Any, ids: list[int], steps: int) -> float:
    """Train on random windows of a text; return the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    data = torch.tensor(ids)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        starts = torch.randint(0, len(data) - 33, (6,), generator=generator)
        batch = torch.stack([data[s : s + 32] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_a_trained_model_continues_real_text(tmp_path: Path, data_dir: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = tmp_path / "m"
    size = tiny.save_spm(data_dir / "llama2-tokenizer.model", folder)
    text = (data_dir / "wikitext2-valid.txt").read_text(encoding="utf-8")[:60_000]
    spm = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = list(spm.encode(text))
    model = tiny.save_model("llama", folder, size, rope_parameters=tiny.LLAMA3_ROPE).float()
    model.train()
    assert train(model, ids, 30) < 8.5
    model.eval().save_pretrained(folder)
    prompts = [[1, *ids[at : at + 16]] for at in (100, 5000, 9000)]
    truth = [continuation(model, prompt, range(3)) for prompt in prompts]
    for kind in ("f32", "f16"):
        to_gguf(folder, tmp_path / f"{kind}.gguf", kind)
        runner = LlamaCpp(tmp_path / f"{kind}.gguf")
        assert [runner.greedy(prompt, NEW, range(3)) for prompt in prompts] == truth, kind


@pytest.mark.parametrize(
    "name", ["deepseek-llm", "gpt-2", "llama-bpe", "qwen2", "starcoder", "llama-spm", "json-spm"]
)
def test_test_strings_encode_as_the_original(tmp_path: Path, data_dir: Path, name: str) -> None:
    folder = tmp_path / "m"
    spm = data_dir / "llama2-tokenizer.model"
    if name == "llama-spm":
        size = tiny.save_spm(spm, folder)
    elif name == "json-spm":
        folder.mkdir()
        document = json.dumps(tiny.spm_document(spm))
        (folder / "tokenizer.json").write_text(document, encoding="utf-8")
        size = 32000
    else:
        size = tiny.save_bpe(data_dir / "vocab" / f"ggml-vocab-{name}.gguf", folder)
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny.save_model("llama", folder, size, **small)
    to_gguf(folder, tmp_path / "m.gguf", "q8_0")
    runner = LlamaCpp(tmp_path / "m.gguf")
    original = "llama-spm" if name == "json-spm" else name
    tests = tiny.vectors(data_dir / "vocab" / f"ggml-vocab-{original}.gguf")
    assert len(tests) >= 46
    wrong = [text for text, ids in tests if runner.tokenize(text) != ids]
    assert not wrong
