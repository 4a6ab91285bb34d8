"""BLOOM as BigScience trained it (pipeline, tensor parallel, ZeRO-1 with BF16_Optimizer), made by
real
DeepSpeed, and what transformers computes with the merged model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.naming import to_hf
from mconv.convert.reshard import reshard
from mconv.convert.to_gguf import to_gguf
from mconv.shardio import Layout, open_checkpoint
from mconv.shardio.coverage import prove

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

TP, PP, DP = 2, 2, 2 if os.environ.get("MCONV_TEST_ALL") else 1
VOCAB, LENGTH, BATCH, BLOCKS = 136, 12, 4, 3
EMBED, HF_NORM = "tied_modules.embed.word_embeddings", "transformer.word_embeddings_layernorm"
OUTER = {
    f"{EMBED}.weight": "transformer.word_embeddings.weight",
    f"{EMBED}.norm.weight": f"{HF_NORM}.weight",
    f"{EMBED}.norm.bias": f"{HF_NORM}.bias",
    "7.weight": "transformer.ln_f.weight",
    "7.bias": "transformer.ln_f.bias",
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bloom")
    script = Path(__file__).with_name("bloom_training.py")
    done = subprocess.run(
        [sys.executable, script, out, str(TP), str(PP), str(DP)],
        capture_output=True,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def hf_name(name: str) -> str:
    """Blocks are layers 3, 4, ...; a transposition lies before them and behind them."""
    number, _, rest = name.partition(".")
    return OUTER.get(name) or f"transformer.h.{int(number) - BLOCKS}.{rest}"


def merged(name: str, parts: list[np.ndarray]) -> np.ndarray:
    """The parts of the tensor-parallel ranks."""
    rest = name.partition(".")[2]
    if rest in ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"):
        return np.concatenate(parts, 1)
    if "query_key" in rest or "h_to_4h" in rest or rest.endswith("embeddings.weight"):
        return np.concatenate(parts, 0)
    assert np.allclose(parts[0], parts[1], rtol=1e-5, atol=1e-9), name
    mean: np.ndarray = (parts[0] + parts[1]) / np.float32(2)
    return mean


def engine_truth(out: Path, kind: str) -> Arrays:
    """What the engines held, merged; of a tied tensor what the first stage had."""
    found: Arrays = {}
    for stage in range(PP):
        ranks: list[Mapping[str, np.ndarray]] = [
            np.load(out / f"truth_{stage}_{t}.npz") for t in range(TP)
        ]
        for key in ranks[0]:
            state, _, name = key.partition("/")
            if state == kind:
                found.setdefault(hf_name(name), merged(name, [r[key] for r in ranks]))
    return found


@pytest.mark.parametrize("kind", ["fp32", "exp_avg", "exp_avg_sq"])
def test_states_have_hugging_face_names(saved: Path, kind: str) -> None:
    ckpt = to_hf(open_checkpoint(saved / "ckpt"))
    got = ckpt.optimizer["master" if kind == "fp32" else kind]
    want = engine_truth(saved, kind)
    assert got.keys() == want.keys() == ckpt.weights.keys()
    for name, value in want.items():
        assert np.array_equal(got[name].read(), value), name
        if kind == "fp32":
            weight = torch.from_numpy(value).bfloat16().float().numpy()
            assert np.array_equal(ckpt.weights[name].cast(np.dtype(np.float32)).read(), weight)
    prove(ckpt.weights)


def test_transformers_computes_the_same_loss(saved: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reshard(saved / "ckpt", tmp_path / "hf", Layout("hf"))
    model, info = transformers.BloomForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    generator = torch.Generator().manual_seed(77)
    rows = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert float(loss) == pytest.approx(json.loads((saved / "loss.json").read_text()), rel=4e-3)


def test_straight_to_gguf(saved: Path, tmp_path: Path, data_dir: Path) -> None:
    """The same tensors as from the merged model, whose GGUF is tested against llama.cpp's."""
    from mconv.convert.gguf import open_gguf

    sys.path.insert(0, str(Path(__file__).parent.parent / "convert"))
    import tiny

    tiny.save_bpe(data_dir / "vocab" / "ggml-vocab-llama-bpe.gguf", tmp_path / "tok", 100)
    reshard(saved / "ckpt", tmp_path / "hf", Layout("hf"))
    for source, out in ((saved / "ckpt", "a.gguf"), (tmp_path / "hf", "b.gguf")):
        to_gguf(source, tmp_path / out, "q8_0", tokenizer=tmp_path / "tok", vocab_size=VOCAB)
    a, b = open_gguf(tmp_path / "a.gguf"), open_gguf(tmp_path / "b.gguf")
    assert list(a.tensors) == list(b.tensors)
    assert all(a.raw(n).tobytes() == b.raw(n).tobytes() for n in a.tensors)
    assert a.entries["general.architecture"].value == "bloom"
