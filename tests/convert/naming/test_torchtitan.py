"""torchtitan checkpoints: DCP with old and new names, rotary order by model type, experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.errors import ConfigError
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.tensor import from_array

HEADS, KV, DIM, HEAD_DIM, WIDTH, EXPERTS = 4, 2, 32, 8, 48, 3
CONFIG: dict[str, Any] = {
    "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "head_dim": HEAD_DIM, "intermediate_size": WIDTH,
    "vocab_size": 40,
}  # fmt: skip


def _hf_model(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    q, k = HEADS * HEAD_DIM, KV * HEAD_DIM
    layer = {"self_attn.q_proj": (q, DIM), "self_attn.k_proj": (k, DIM),
             "self_attn.v_proj": (k, DIM), "self_attn.o_proj": (DIM, q),
             "input_layernorm": (DIM,), "post_attention_layernorm": (DIM,)}  # fmt: skip
    mlp = {"gate_proj": (WIDTH, DIM), "up_proj": (WIDTH, DIM), "down_proj": (DIM, WIDTH)}
    if kind != "llama":
        layer |= {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
    if kind == "qwen3_moe":
        layer |= {f"mlp.experts.{e}.{n}": s for e in range(EXPERTS) for n, s in mlp.items()}
        layer["mlp.gate"] = (EXPERTS, DIM)
    else:
        layer |= {f"mlp.{n}": s for n, s in mlp.items()}
    shapes = {"model.embed_tokens.weight": (40, DIM), "model.norm.weight": (DIM,)}
    shapes |= {f"model.layers.{i}.{n}.weight": s for i in range(2) for n, s in layer.items()}
    shapes["lm_head.weight"] = (40, DIM)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """torchtitan's ``_permute``: halves to pairs."""
    d = rows.shape[0] // heads
    return rows.reshape(heads, 2, d // 2, -1).transpose(0, 2, 1, 3).reshape(rows.shape)


def _titan(model: dict[str, np.ndarray], kind: str, *, new: bool) -> dict[str, np.ndarray]:
    names = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "gate_proj": "w1", "up_proj": "w3",
             "down_proj": "w2"}  # fmt: skip
    out: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, value in model.items():
        words = name.removeprefix("model.").split(".")
        if words[0] == "embed_tokens":
            out["tok_embeddings.weight"] = value
        elif words[0] == "lm_head":
            out["lm_head.weight" if new else "output.weight"] = value
        elif words[0] == "norm":
            out[name.removeprefix("model.")] = value
        else:
            at, part = f"layers.{words[1]}", words[-2]
            if part in ("q_proj", "k_proj", "v_proj"):
                heads = HEADS if part == "q_proj" else KV
                if kind == "llama" and part != "v_proj":
                    value = _permute(value, heads)
                inner = "attention.qkv_linear" if new else "attention"
                out[f"{at}.{inner}.{names[part]}.weight"] = value
            elif part == "o_proj":
                out[f"{at}.attention.wo.weight"] = value
            elif part in ("q_norm", "k_norm"):
                out[f"{at}.attention.{part}.weight"] = value
            elif "experts" in words:
                dims = "EDF" if part == "down_proj" else "EFD"
                w = names[part]
                key = f"routed_experts.inner_experts.{w}_{dims}" if new else f"experts.{w}"
                stacks.setdefault(f"{at}.moe.{key}", []).append(value)
            elif part == "gate":
                out[f"{at}.moe.router.gate.weight"] = value
            elif part in names:
                out[f"{at}.feed_forward.{names[part]}.weight"] = value
            else:
                norm = "attention_norm" if part == "input_layernorm" else "ffn_norm"
                out[f"{at}.{norm}.weight"] = value
    return out | {n: np.stack(v) for n, v in stacks.items()}


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_to_hf(kind: str, new: bool) -> None:
    model = _hf_model(kind)
    config = {**CONFIG, "model_type": kind, "num_experts": EXPERTS}
    weights = {n: from_array(a) for n, a in _titan(model, kind, new=new).items()}
    checkpoint = Checkpoint(
        path=Path("x"), format="dcp", naming="torchtitan", weights=weights, config=config
    )
    made = to_hf(checkpoint)
    assert set(made.weights) == set(model)
    assert all(np.array_equal(t.read(), model[n]) for n, t in made.weights.items())
    assert any("reordered" in w for w in made.warnings) == (kind == "llama")


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_dcp_of_torchtitan_is_recognised(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    model = _hf_model("llama")
    state = {n: torch.from_numpy(a) for n, a in _titan(model, "llama", new=False).items()}
    moments = {"optimizer": {f"state.{n}.exp_avg": 2 * t for n, t in state.items()}}
    dcp.save({**state, **moments}, checkpoint_id=tmp_path / "step-3", no_dist=True)
    with pytest.raises(ConfigError, match="--config"):
        to_hf(open_checkpoint(tmp_path / "step-3"))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "llama"}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.naming == "torchtitan"
    made = to_hf(checkpoint)
    assert all(np.array_equal(t.read(), model[n]) for n, t in made.weights.items())
    assert set(made.weights) == set(model)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(made.optimizer["exp_avg"][q].read(), 2 * model[q])


def test_there_and_back() -> None:
    model = _hf_model("llama")
    hf = Checkpoint(
        path=Path("x"),
        format="hf",
        weights={n: from_array(a) for n, a in model.items()},
        config={**CONFIG, "model_type": "llama"},
    )
    there = from_hf(hf, "torchtitan")
    again = to_hf(replace(there, config=hf.config))
    assert all(np.array_equal(t.read(), model[n]) for n, t in again.weights.items())
