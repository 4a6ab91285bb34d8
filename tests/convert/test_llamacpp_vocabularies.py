"""Vocabularies of further kinds in the real llama.cpp: the ids of the original tokenizers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.gguf import open_gguf
from mconv.convert.to_gguf import to_gguf
from mconv.convert.tokenizers.restore import restore_tokenizer
from mconv.convert.tokenizers.stored import stored_vocabulary
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny
import tiny_tokenizers
from llamacpp import LlamaCpp

pytest.importorskip("xllamacpp")
HIDDEN, INNER = 32, 32


def wrong_texts(path: Path, vocabulary: Path) -> list[str]:
    runner = LlamaCpp(path)
    tests = tiny.vectors(vocabulary)
    assert len(tests) >= 46
    return [text for text, ids in tests if runner.tokenize(text) != ids]


def test_phi3(tmp_path: Path, data_dir: Path) -> None:
    path = data_dir / "vocab" / "ggml-vocab-phi-3.gguf"
    made = restore_tokenizer(stored_vocabulary(open_gguf(path).entries, path))
    for name, data in made.files.items():
        (tmp_path / name).write_bytes(data)
    size = len(open_gguf(path)["tokenizer.ggml.tokens"])
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    tiny_tokenizers.write(tmp_path / "config.json", config)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": (size, HIDDEN),
        "model.norm": (HIDDEN,),
        f"{layer}.input_layernorm": (HIDDEN,),
        f"{layer}.post_attention_layernorm": (HIDDEN,),
        **{f"{layer}.self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qo"},
        **{f"{layer}.self_attn.{x}_proj": (HIDDEN // 2, HIDDEN) for x in "kv"},
        **{f"{layer}.mlp.{x}_proj": (INNER, HIDDEN) for x in ("gate", "up", "down")},
    }
    weights = {f"{name}.weight": np.full(s, 0.01, np.float32) for name, s in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    to_gguf(tmp_path, tmp_path / "m.gguf", "q8_0")
    assert not wrong_texts(tmp_path / "m.gguf", path)


@pytest.mark.parametrize("kind", ["bert", "bert-txt"])
def test_bert(tmp_path: Path, data_dir: Path, kind: str) -> None:
    tiny_tokenizers.KINDS[kind][0](tmp_path, data_dir)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2}
    tiny_tokenizers.write(tmp_path / "config.json", config)
    layer, size = "encoder.layer.0", config["vocab_size"]
    square, norms = (HIDDEN, HIDDEN), ["embeddings.LayerNorm"]
    matrices = {f"{layer}.attention.self.{x}": square for x in ("query", "key", "value")}
    matrices |= {f"{layer}.attention.output.dense": square}
    matrices |= {f"{layer}.{x}.dense": square for x in ("intermediate", "output")}
    norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    tables = {"word": size, "position": config["max_position_embeddings"], "token_type": 2}
    weights = {f"embeddings.{x}_embeddings.weight": (n, HIDDEN) for x, n in tables.items()}
    weights |= {f"{name}.weight": shape for name, shape in matrices.items()}
    weights |= {f"{name}.weight": (HIDDEN,) for name in norms}
    weights |= {f"{name}.bias": (HIDDEN,) for name in (*matrices, *norms)}
    values = {name: np.full(shape, 0.01, np.float32) for name, shape in weights.items()}
    save_file(values, tmp_path / "model.safetensors")
    to_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    assert not wrong_texts(tmp_path / "m.gguf", data_dir / "vocab" / "ggml-vocab-bert-bge.gguf")
