"""Tiny models of every family in the real llama.cpp: the same greedy tokens as transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from mconv.convert.to_gguf import to_gguf

sys.path.insert(0, str(Path(__file__).parent))
import tiny_archs
from llamacpp import LlamaCpp

pytest.importorskip("xllamacpp")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

NEW = 16
PROMPTS = [[5, 17, 99, 3], [300, 301, 302, 303, 304, 305, 306, 307], [42]]


def continuation(model: Any, prompt: list[int], banned: list[int]) -> list[int]:
    """Return transformers' greedy continuation without the banned tokens."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0, suppress_tokens=banned,
        )  # fmt: skip
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("name", [n for n, f in tiny_archs.FAMILIES.items() if not f.mxfp4])
def test_greedy_tokens(tmp_path: Path, data_dir: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    family = tiny_archs.FAMILIES[name]
    tiny_archs.save_family(name, tmp_path / "m", data_dir)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    to_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")
    runner = LlamaCpp(tmp_path / "m.gguf")
    size = model.config.get_text_config().vocab_size
    banned = [0, 1, 2] if family.vocab == tiny_archs.SPM else [0, 1, 2, *range(600, size)]
    for prompt in PROMPTS:
        assert runner.greedy(prompt, NEW, banned) == continuation(model, prompt, banned)
