"""Mistral's own files (``consolidated.safetensors``, ``params.json``, ``tekken.json``): models of
transformers in that form come back bit for bit, and become GGUF.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.gguf import open_gguf
from mconv.convert.naming import to_hf
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError
from mconv.shardio import open_checkpoint

from .jax_cases import Arrays

pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.numpy import load_file, save_file

from .test_jax import hf_files, make_model

WORDS = 280  # 256 bytes, 4 merged pieces, 20 special tokens


def _pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves to adjacent pairs."""
    half = rows.shape[0] // heads // 2
    split = rows.reshape(heads, 2, half, -1)
    return np.ascontiguousarray(np.swapaxes(split, 1, 2)).reshape(rows.shape)


def _mistral(s: Arrays, config: Any) -> Arrays:
    out = {"tok_embeddings.weight": s["model.embed_tokens.weight"],
           "norm.weight": s["model.norm.weight"], "output.weight": s["lm_head.weight"]}  # fmt: skip
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    if config.model_type == "mixtral":
        names["feed_forward.gate"] = "block_sparse_moe.gate"
        names |= {f"feed_forward.experts.{e}.{w}": f"block_sparse_moe.experts.{e}.{w}"
                  for e in range(4) for w in ("w1", "w2", "w3")}  # fmt: skip
    else:
        pairs = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
        names |= {f"feed_forward.{w}": f"mlp.{p}" for w, p in pairs}
    for i in range(config.num_hidden_layers):
        for x, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            w = s[f"model.layers.{i}.self_attn.{x}_proj.weight"]
            out[f"layers.{i}.attention.w{x}.weight"] = _pairs(w, heads)
        for left, right in names.items():
            out[f"layers.{i}.{left}.weight"] = s[f"model.layers.{i}.{right}.weight"]
    return out


def _params(config: Any) -> dict[str, Any]:
    moe = {"moe": {"num_experts": 4, "num_experts_per_tok": 2}}
    return {"dim": config.hidden_size, "n_layers": config.num_hidden_layers,
            "head_dim": config.head_dim, "hidden_dim": config.intermediate_size,
            "n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads,
            "norm_eps": config.rms_norm_eps, "vocab_size": WORDS,
            "rope_theta": config.rope_parameters["rope_theta"],
            **(moe if config.model_type == "mixtral" else {})}  # fmt: skip


def _save(folder: Path, tensors: Arrays, params: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(params))
    pieces = [bytes([b]) for b in range(256)] + [b"th", b"the", b"in", b"ing"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": None}
             for i, p in enumerate(pieces)]  # fmt: skip
    config = {"pattern": r"\p{L}+", "num_vocab_tokens": 260, "default_vocab_size": WORDS,
              "default_num_special_tokens": 20, "version": "v3"}  # fmt: skip
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    return folder


@pytest.mark.parametrize("case", ["mistral", "mixtral"])
def test_to_hf_and_gguf(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from mconv.convert.reshard import reshard
    from mconv.shardio.layout import Layout

    from . import test_jax

    monkeypatch.setitem(test_jax.SIZES, "vocab_size", WORDS)
    model = make_model(case)
    truth = hf_files(model, tmp_path / "hf")
    folder = _save(tmp_path / "m", _mistral(truth, model.config), _params(model.config))
    opened = open_checkpoint(folder)
    assert (opened.naming, opened.format) == ("meta", "hf")
    reshard(opened, tmp_path / "made", Layout(format="hf"))
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert {n: a.tobytes() for n, a in made.items()} == {n: a.tobytes() for n, a in truth.items()}
    again = type(model).from_pretrained(tmp_path / "made").eval()
    ids = torch.arange(24)[None] % WORDS
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    to_gguf(folder, tmp_path / "direct.gguf", "f32", name="x")
    to_gguf(tmp_path / "hf", tmp_path / "hf.gguf", "f32", tokenizer=folder, name="x")
    direct, plain = open_gguf(tmp_path / "direct.gguf"), open_gguf(tmp_path / "hf.gguf")
    assert list(direct.tensors) == list(plain.tensors)
    assert direct["tokenizer.ggml.pre"] == plain["tokenizer.ggml.pre"] == "tekken"
    a, b = (open_checkpoint(tmp_path / f"{n}.gguf").weights for n in ("direct", "hf"))
    assert all(a[n].read().tobytes() == b[n].read().tobytes() for n in b)


@pytest.mark.parametrize(
    "more", [{"yarn": {"factor": 16}}, {"llama_4_scaling": {"beta": 0.1}}, {"vision_encoder": {}}]
)
def test_settings_that_are_not_translated(tmp_path: Path, more: dict[str, Any]) -> None:
    model = make_model("mistral")
    truth = hf_files(model, tmp_path / "hf")
    params = {**_params(model.config), "vocab_size": 40, **more}
    folder = _save(tmp_path / "m", _mistral(truth, model.config), params)
    with pytest.raises(ConfigError, match=f"{next(iter(more))}.*--config"):
        to_hf(open_checkpoint(folder))
    given = to_hf(open_checkpoint(folder, config=tmp_path / "hf" / "config.json"))
    assert set(given.weights) == set(truth)
