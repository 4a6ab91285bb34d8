"""MindFormers' checkpoints: models of transformers under its names and fusions come back bit for
bit,
with moments, and compute the same; so do safetensors with such names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.convert.reshard import reshard
from mconv.errors import ConfigError
from mconv.shardio import open_checkpoint
from mconv.shardio.layout import Layout

from .jax_cases import Arrays, moments_of

pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.numpy import save_file

from .test_jax import check, hf_files, make_model


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def write_ckpt(path: Path, arrays: Arrays) -> Path:
    """MindSpore's protobuf list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"float32": b"Float32", "int32": b"Int32"}
    with path.open("wb") as file:
        for name, array in arrays.items():
            inner = b"".join(b"\x08" + _varint(n) for n in array.shape or (0,))
            inner += _field(2, kinds[array.dtype.name])
            inner += _field(3, np.ascontiguousarray(array).tobytes())
            file.write(_field(1, _field(1, name.encode()) + _field(2, inner)))
    return path


def mindformers(s: Arrays, config: Any, *, fused: bool, grouped: bool = False) -> Arrays:
    """``fused``: ``qkv_concat``; ``grouped``: experts for grouped products."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    out: Arrays = {"model.tok_embeddings.embedding_weight": s["model.embed_tokens.weight"],
                   "model.norm_out.weight": s["model.norm.weight"]}  # fmt: skip
    if "lm_head.weight" in s:
        out["lm_head.weight"] = s["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        h = {n.split(f"{at}.")[1]: a for n, a in s.items() if n.startswith(f"{at}.")}
        out[f"{at}.attention_norm.weight"] = h["input_layernorm.weight"]
        out[f"{at}.ffn_norm.weight"] = h["post_attention_layernorm.weight"]
        out[f"{at}.attention.wo.weight"] = h["self_attn.o_proj.weight"]
        for end in ("weight", "bias"):
            found = [h.get(f"self_attn.{x}_proj.{end}") for x in "qkv"]
            if found[0] is None:
                continue
            if not fused:
                out |= {f"{at}.attention.w{x}.{end}": a for x, a in zip("qkv", found, strict=True)}
                continue
            d, rows = found[0].shape[0] // heads, []
            for g in range(kv):
                r = heads // kv
                rows += [found[0][g * r * d : (g + 1) * r * d], found[1][g * d : (g + 1) * d],
                         found[2][g * d : (g + 1) * d]]  # fmt: skip
            out[f"{at}.attention.w_qkv.{end}"] = np.concatenate(rows)
        if config.model_type == "mixtral":
            moe = "block_sparse_moe"
            out[f"{at}.feed_forward.router.dense.weight"] = h[f"{moe}.gate.weight"]
            for w in ("w1", "w2", "w3"):
                stack = np.stack([h[f"{moe}.experts.{e}.{w}.weight"] for e in range(4)])
                stack = stack.transpose(0, 2, 1) if grouped else stack
                out[f"{at}.feed_forward.ffn.{w}.weight"] = stack
            continue
        gate, up, down = (h[f"mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        out[f"{at}.feed_forward.w2.weight"] = down
        if fused:
            both = np.empty((2 * len(gate), gate.shape[1]), gate.dtype)
            both[0::2], both[1::2] = gate, up
            out[f"{at}.feed_forward.w_gate_hidden.weight"] = both
        else:
            out |= {f"{at}.feed_forward.w1.weight": gate, f"{at}.feed_forward.w3.weight": up}
    return out


@pytest.mark.parametrize(
    ("case", "fused", "grouped"),
    [("llama", False, False), ("llama", True, False), ("tied", True, False),
     ("qwen2", True, False), ("qwen2", False, False), ("mixtral", False, False),
     ("mixtral", False, True)],
)  # fmt: skip
def test_ckpt(tmp_path: Path, case: str, fused: bool, grouped: bool) -> None:
    model = make_model(case)
    truth = hf_files(model, tmp_path / "hf")
    moments = {"exp_avg": moments_of(truth, 2), "exp_avg_sq": moments_of(truth, 3)}
    arrays = mindformers(truth, model.config, fused=fused, grouped=grouped)
    for prefix, state in (("adam_m", "exp_avg"), ("adam_v", "exp_avg_sq")):
        made = mindformers(moments[state], model.config, fused=fused, grouped=grouped)
        arrays |= {f"{prefix}.{n}": a for n, a in made.items()}
    arrays |= {"global_step": np.array([4], np.int32), "epoch_num": np.array([1], np.int32)}
    path = write_ckpt(tmp_path / "run" / "llama-4_2.ckpt", arrays)
    opened = open_checkpoint(path)
    assert (opened.naming, opened.step) == ("mindspore", 4)
    check(path, model, truth, tmp_path / "hf", moments)
    assert any("December 2024" in w for w in to_hf(_with(opened, tmp_path)).warnings) == fused


def _with(opened: Any, folder: Path) -> Any:
    import json

    return replace(opened, config=json.loads((folder / "hf" / "config.json").read_text()))


def test_safetensors(tmp_path: Path) -> None:
    model = make_model("llama")
    truth = hf_files(model, tmp_path / "hf")
    arrays = mindformers(truth, model.config, fused=True)
    (tmp_path / "ms").mkdir()
    save_file(arrays, tmp_path / "ms" / "model.safetensors")
    assert open_checkpoint(tmp_path / "ms").naming == "mindspore"
    check(tmp_path / "ms", model, truth, tmp_path / "hf", {})


def test_there_and_back(tmp_path: Path) -> None:
    truth = hf_files(make_model("qwen2"), tmp_path / "hf")
    again = to_hf(from_hf(replace(open_checkpoint(tmp_path / "hf"), tied={}), "mindspore"))
    assert all(again.weights[n].read().tobytes() == a.tobytes() for n, a in truth.items())


def test_refusals(tmp_path: Path) -> None:
    model = make_model("llama")
    arrays = mindformers(hf_files(model, tmp_path / "hf"), model.config, fused=False)
    path = write_ckpt(tmp_path / "a" / "m.ckpt", arrays)
    with pytest.raises(ConfigError, match="--config"):
        to_hf(open_checkpoint(path))
    del arrays["model.layers.2.attention.wk.weight"]
    path = write_ckpt(tmp_path / "b" / "m.ckpt", arrays)
    with pytest.raises(ConfigError, match="k of layer 2"):
        to_hf(_with(open_checkpoint(path), tmp_path))


def test_unknown_names_are_kept(tmp_path: Path) -> None:
    path = write_ckpt(tmp_path / "m.ckpt", {"backbone.dense.weight": np.ones((2, 3), np.float32)})
    target = tmp_path / "made"
    reshard(open_checkpoint(path), target, Layout(format="hf"))
    assert list(open_checkpoint(target).weights) == ["backbone.dense.weight"]
