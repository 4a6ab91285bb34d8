"""Targets with names of their own: Meta's files, torchtitan, GGUF, against what loads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mconv import Layout, reshard, roundtrip, to_gguf
from mconv.errors import ConfigError, LayoutError, MconvError, UnsupportedError

from ..shardio.writers.families import HEAD_DIM, family
from .tiny import save_bpe

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def paired(weight: np.ndarray) -> np.ndarray:
    """Rows of q or k as Meta has them: pairs adjacent, where Hugging Face has two halves."""
    rows, columns = weight.shape
    halves = weight.reshape(rows // HEAD_DIM, 2, HEAD_DIM // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_meta_files_are_cut_as_metas_layers_are(tmp_path: Path, tp: int, theta: float) -> None:
    """Column-parallel rows, row-parallel columns, shared heads where files outnumber them."""
    ckpt = family("llama", optimizer=False, theta=theta, dtype="float32")
    reshard(ckpt, tmp_path / "out", Layout("meta", tp=tp))
    want = {n: t.read() for n, t in ckpt.weights.items()}
    heads, kv_heads = 4, 2
    for rank in range(tp):
        part = torch.load(tmp_path / "out" / f"consolidated.{rank:02d}.pth", weights_only=True)
        part = {n: t.numpy() for n, t in part.items()}
        layer = "layers.1"
        hf = "model.layers.1"
        own = slice(rank * heads // tp * HEAD_DIM, (rank + 1) * heads // tp * HEAD_DIM)
        size = max(1, kv_heads // tp)
        first = rank * kv_heads // tp
        shared = slice(first * HEAD_DIM, (first + size) * HEAD_DIM)
        q, k, v, o = (want[f"{hf}.self_attn.{x}_proj.weight"] for x in "qkvo")
        np.testing.assert_array_equal(part[f"{layer}.attention.wq.weight"], paired(q)[own])
        np.testing.assert_array_equal(part[f"{layer}.attention.wk.weight"], paired(k)[shared])
        np.testing.assert_array_equal(part[f"{layer}.attention.wv.weight"], v[shared])
        np.testing.assert_array_equal(part[f"{layer}.attention.wo.weight"], o[:, own])
        gate, up, down = (want[f"{hf}.mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        inner = slice(rank * 24 // tp, (rank + 1) * 24 // tp)
        np.testing.assert_array_equal(part[f"{layer}.feed_forward.w1.weight"], gate[inner])
        np.testing.assert_array_equal(part[f"{layer}.feed_forward.w3.weight"], up[inner])
        np.testing.assert_array_equal(part[f"{layer}.feed_forward.w2.weight"], down[:, inner])
        np.testing.assert_array_equal(part["norm.weight"], want["model.norm.weight"])
        embedding, n = want["model.embed_tokens.weight"], 40 // tp if theta > 1e5 else 16 // tp
        cut = slice(rank * n, (rank + 1) * n)
        cut_rows = embedding[cut] if theta > 1e5 else embedding[:, cut]
        np.testing.assert_array_equal(part["tok_embeddings.weight"], cut_rows)
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert (params["dim"], params["n_heads"], params["n_kv_heads"]) == (16, 4, 2)


@pytest.mark.parametrize(
    ("dim", "inner"), [(4096, 11008), (5120, 13824), (8192, 22016), (8192, 28672), (4096, 14336),
                       (2048, 8192), (3072, 8192), (64, 161), (64, 7)],
)  # fmt: skip
def test_meta_computes_the_width_from_params(dim: int, inner: int) -> None:
    """With the formula of Meta's FeedForward."""
    from mconv.convert.naming.meta import _width

    params = _width(dim, inner)
    hidden = int(2 * 4 * dim / 3)
    if "ffn_dim_multiplier" in params:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params["multiple_of"]
    assert multiple * ((hidden + multiple - 1) // multiple) == inner


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("meta:tp=3", "llama", r"tp=3.*nearest valid: tp=2 or tp=4"),
        ("meta:tp=8", "llama", r"tp=8.*nearest valid: tp=4"),
        ("meta:pp=2", "llama", "pp=2"),
        ("meta:tp=2", "mixtral", "experts"),
        ("meta", "qwen3", "'qwen3' has no Meta naming"),
        ("torchtitan:pp=2", "llama", "pp=2"),
        ("torchtitan", "mixtral", "no torchtitan naming"),
        ("gguf:tp=2", "llama", "tp=2"),
        ("gguf:dtype=int8", "llama", "dtype"),
        ("gugf", "llama", "did you mean 'gguf'"),
    ],
)
def test_impossible_targets_are_refused(tmp_path: Path, text: str, kind: str, message: str) -> None:
    with pytest.raises(MconvError, match=message):
        reshard(family(kind, optimizer=False), tmp_path / "out", Layout.parse(text))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["meta", "gguf"])
def test_targets_without_optimizers_say_so(tmp_path: Path, target: str) -> None:
    with pytest.raises(UnsupportedError, match="weights only"):
        reshard(family("llama"), tmp_path / "out", Layout(target), with_optimizer=True)
    with pytest.raises(ConfigError, match="gguf"):
        roundtrip(family("llama"), ["gguf"], work=tmp_path)


@pytest.mark.parametrize("text", ["torchtitan", "torchtitan:dp=3,tp=2"])
def test_torch_loads_a_torchtitan_checkpoint(tmp_path: Path, text: str) -> None:
    """As its checkpointer asks: flat model keys, flattened optimizer, counters."""
    import torch.distributed.checkpoint as dcp

    ckpt = family("llama")
    reshard(ckpt, tmp_path / "out", Layout.parse(text))
    masters = {n: t.read() for n, t in ckpt.optimizer["master"].items()}
    q = "layers.1.attention.qkv_linear.wq.weight"
    hollow = torch.full((16, 16), float("nan"))
    state = {
        q: hollow.clone(),
        "tok_embeddings.weight": torch.zeros(40, 16),
        "optimizer": {
            f"state.{q}.exp_avg": hollow.clone(),
            f"state.{q}.step": torch.zeros(()),
            f"param_groups.{q}.lr": None,
            "param_groups.norm.weight.weight_decay": None,
            f"param_groups.{q}.betas": None,
        },
        "train_state": {"step": 0, "ntokens_seen": 1},
        "lr_scheduler": {"last_epoch": 0},
    }
    dcp.load(state, checkpoint_id=str(tmp_path / "out" / "step-7"))
    hf = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(state[q].numpy(), paired(masters[hf]))
    embedding = state["tok_embeddings.weight"].numpy()
    np.testing.assert_array_equal(embedding, masters["model.embed_tokens.weight"])
    optimizer = state["optimizer"]
    moment = ckpt.optimizer["exp_avg"][hf].read()
    np.testing.assert_array_equal(optimizer[f"state.{q}.exp_avg"].numpy(), paired(moment))
    assert optimizer[f"state.{q}.step"] == 7
    assert optimizer[f"param_groups.{q}.lr"] == 0.01
    assert optimizer[f"param_groups.{q}.betas"] == (0.9, 0.95)
    assert optimizer["param_groups.norm.weight.weight_decay"] == 0.0
    assert state["train_state"] == {"step": 7, "ntokens_seen": 0}
    assert state["lr_scheduler"] == {"last_epoch": 7}


def test_bare_torchtitan_weights_are_a_seed(tmp_path: Path) -> None:
    report = reshard(family("llama", optimizer=False), tmp_path / "out", Layout("torchtitan"))
    assert "step-0/.metadata" in report.files
    with pytest.raises(LayoutError, match="weights-only"):
        reshard(replace(family("llama"), step=0), tmp_path / "x", Layout("torchtitan"))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(None, "bf16"), ("f32", "f32"), ("f16", "f16"), ("bf16", "bf16")]
)
def test_gguf_is_what_to_gguf_writes(
    tmp_path: Path, data_dir: Path, dtype: str | None, kind: str
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    size = save_bpe(data_dir / "vocab" / "ggml-vocab-llama-bpe.gguf", tokenizer, 300)
    ckpt = family("llama", vocab=size)
    report = reshard(ckpt, tmp_path / "a.gguf", Layout("gguf", dtype=dtype), tokenizer=tokenizer)
    to_gguf(ckpt, tmp_path / "b.gguf", kind, tokenizer=tokenizer)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert report.files == {"a.gguf": (tmp_path / "a.gguf").stat().st_size}
