"""The naming worlds of single-model codes: llama2.c, nanoGPT, and what they have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.errors import ConfigError
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.tensor import from_array

RNG = np.random.default_rng(7)


def _array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def _checkpoint(naming: str, arrays: dict[str, np.ndarray], **fields: Any) -> Checkpoint:
    weights = {n: from_array(a) for n, a in arrays.items()}
    return Checkpoint(path=Path("x"), format="x", naming=naming, weights=weights, **fields)


def _llama2c(torch: Any, folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint as llama2.c's train.py writes it: compiled model, tied output."""
    dim, width, kv = 16, 24, 8
    shapes = {"attention.wq": (dim, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim),
              "attention.wo": (dim, dim), "feed_forward.w1": (width, dim),
              "feed_forward.w2": (dim, width), "feed_forward.w3": (width, dim),
              "attention_norm": (dim,), "ffn_norm": (dim,)}  # fmt: skip
    arrays = {"tok_embeddings.weight": _array(32, dim)}
    arrays |= {f"layers.{i}.{n}.weight": _array(*s) for i in range(2) for n, s in shapes.items()}
    arrays["norm.weight"] = _array(dim)
    model = {f"_orig_mod.{n}": torch.from_numpy(a) for n, a in arrays.items()}
    model["_orig_mod.output.weight"] = model["_orig_mod.tok_embeddings.weight"]
    args = {"dim": dim, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 32,
            "multiple_of": 8, "max_seq_len": 64, "dropout": 0.0}  # fmt: skip
    state = {
        i: {"exp_avg": torch.ones_like(t), "exp_avg_sq": t**2, "step": torch.tensor(5.0)}
        for i, t in enumerate(list(model.values())[:-1])
    }
    groups = [{"params": list(state), "lr": 1e-3}]
    saved = {"model": model, "optimizer": {"state": state, "param_groups": groups},
             "model_args": args, "iter_num": 5, "best_val_loss": 1.0,
             "config": {"dim": dim}}  # fmt: skip
    torch.save(saved, folder / "ckpt.pt")
    return arrays


def test_llama2c(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    arrays = _llama2c(torch, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.naming == "meta"
    made = to_hf(checkpoint)
    assert made.config is not None
    assert made.config["max_position_embeddings"] == 64
    assert made.config["tie_word_embeddings"] is True
    assert made.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    k = arrays["layers.1.attention.wk.weight"]
    halves = np.concatenate([k[0:4:2], k[1:4:2], k[4:8:2], k[5:8:2]])
    name = "model.layers.1.self_attn.k_proj.weight"
    assert np.array_equal(made.weights[name].read(), halves)
    assert np.array_equal(made.optimizer["exp_avg_sq"][name].read(), halves**2)


def _nanogpt(bias: bool) -> dict[str, np.ndarray]:
    n = 8
    arrays = {"transformer.wte.weight": _array(20, n), "transformer.wpe.weight": _array(16, n)}
    for i in range(2):
        for part, shape in {"ln_1": (n,), "ln_2": (n,), "attn.c_attn": (3 * n, n),
                            "attn.c_proj": (n, n), "mlp.c_fc": (4 * n, n),
                            "mlp.c_proj": (n, 4 * n)}.items():  # fmt: skip
            arrays[f"transformer.h.{i}.{part}.weight"] = _array(*shape)
            if bias:
                arrays[f"transformer.h.{i}.{part}.bias"] = _array(shape[0])
    arrays["transformer.ln_f.weight"] = _array(n)
    if bias:
        arrays["transformer.ln_f.bias"] = _array(n)
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"]
    return arrays


NANO_ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 20,
             "dropout": 0.0}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_computes_the_same_in_transformers(tmp_path: Path, bias: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    arrays = _nanogpt(bias)
    tensors = {n: torch.from_numpy(a) for n, a in arrays.items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    torch.save({"model": tensors, "model_args": NANO_ARGS, "iter_num": 1}, tmp_path / "ckpt.pt")
    opened = open_checkpoint(tmp_path)
    assert opened.naming == "nanogpt"
    made = to_hf(opened)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**dict(made.config or {})))
    state = {n: torch.from_numpy(t.read()) for n, t in made.weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (list(missing), list(unexpected)) == (["lm_head.weight"], [])
    model.tie_weights()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        got = model.eval()(tokens).logits[0].numpy()
    assert np.allclose(got, _nanogpt_forward(torch, tensors, tokens[0]), atol=1e-4)


def _nanogpt_forward(torch: Any, w: dict[str, Any], tokens: Any) -> np.ndarray:
    """nanoGPT's forward pass, from its description."""
    f = torch.nn.functional
    n = len(tokens)
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:n]

    def part(x: Any, name: str) -> Any:
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
        if weight.ndim == 1:
            return f.layer_norm(x, weight.shape, weight, bias, 1e-5)
        return f.linear(x, weight, bias)

    for i in range(2):
        at = f"transformer.h.{i}"
        q, k, v = part(part(x, f"{at}.ln_1"), f"{at}.attn.c_attn").split(8, dim=1)
        q, k, v = (t.view(n, 2, 4).transpose(0, 1) for t in (q, k, v))
        y = f.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + part(y.transpose(0, 1).reshape(n, 8), f"{at}.attn.c_proj")
        y = f.gelu(part(part(x, f"{at}.ln_2"), f"{at}.mlp.c_fc"))
        x = x + part(y, f"{at}.mlp.c_proj")
    out: np.ndarray = (part(x, "transformer.ln_f") @ w["lm_head.weight"].T).numpy()
    return out


def test_nanogpt_there_and_back() -> None:
    arrays = _nanogpt(bias=True)
    arrays.pop("lm_head.weight")
    checkpoint = _checkpoint("nanogpt", arrays, args={"model_args": NANO_ARGS})
    again = from_hf(to_hf(checkpoint), "nanogpt")
    assert set(again.weights) == set(arrays)
    assert all(np.array_equal(t.read(), arrays[n]) for n, t in again.weights.items())


def test_gpt2_of_hugging_face_is_not_nanogpt() -> None:
    from mconv.shardio.worlds import world_of

    conv = {"transformer.h.0.attn.c_attn.weight": from_array(_array(8, 24))}
    assert world_of(conv) == "hf"


def test_no_settings_and_no_config_is_refused() -> None:
    names = ("layers.0.attention.wq.weight", "tok_embeddings.weight")
    with pytest.raises(ConfigError, match="--config"):
        to_hf(_checkpoint("meta", {n: _array(8, 8) for n in names}))
