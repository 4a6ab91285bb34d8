"""Peak memory of merging and converting does not depend on the size of the model: it stays below
300 MB plus the budget of ``--max-memory``, as the kernel counts it (``VmHWM``) in a process of its
own.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import TRAINED
from synthetic import HIDDEN, VOCAB, llama

BUDGET = "64MiB"
LIMIT = 300_000_000 + (64 << 20)
FFN = 40_960
_RUN = """
import sys
from mconv.cli import main
try:
    main(sys.argv[1:])
finally:
    with open("/proc/self/status") as status:
        print([line for line in status if line.startswith("VmHWM")][0])
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the kernel does not tell the peak here"
)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 530 MB with three tensors of 168 MB in one file."""
    folder = tmp_path_factory.mktemp("huge") / "model"
    assert llama(folder, layers=1, ffn=FFN, shards=1) > 500e6
    return folder


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sizes from two tensor-parallel ranks: fused rows, and columns to be interleaved."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("huge") / "megatron"
    settings = argparse.Namespace(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=16,
        group_query_attention=False, num_query_groups=1, kv_channels=HIDDEN // 16,
        max_position_embeddings=256, padded_vocab_size=768, normalization="RMSNorm",
        norm_epsilon=1e-5, swiglu=True, add_bias_linear=False, position_embedding_type="rope",
        rotary_base=10000, rotary_percent=1.0, untie_embeddings_and_output_weights=True,
        tensor_model_parallel_size=2, pipeline_model_parallel_size=1, transformer_impl="local",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1 << 20, generator=generator) * 0.05
    shapes = {
        "embedding.word_embeddings.weight": (384, HIDDEN),
        "decoder.layers.0.input_layernorm.weight": (HIDDEN,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (3 * HIDDEN // 2, HIDDEN),
        "decoder.layers.0.self_attention.linear_proj.weight": (HIDDEN, HIDDEN // 2),
        "decoder.layers.0.pre_mlp_layernorm.weight": (HIDDEN,),
        "decoder.layers.0.mlp.linear_fc1.weight": (FFN, HIDDEN),
        "decoder.layers.0.mlp.linear_fc2.weight": (HIDDEN, FFN // 2),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "output_layer.weight": (384, HIDDEN),
    }
    for rank in range(2):
        place = folder / "iter_0000001" / f"mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        model = {}
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            values = noise.repeat(-(-size // len(noise)))[:size].clone().view(shape)
            model[name] = values if len(shape) == 1 else values + rank
        state = {"args": settings, "checkpoint_version": 3.0, "iteration": 1, "model": model}
        torch.save(state, place / "model_optim_rng.pt")
    return folder


JOBS = {
    "merge": ["reshard", "{src}", "{out}/hf"],
    "merge and cast": ["reshard", "{src}", "{out}/hf", "--dtype", "bf16"],
    "q8_0": ["to-gguf", "{src}", "{out}/m.gguf", "--type", "q8_0", "--tokenizer", "{tok}"],
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("source", ["hugging_face", "megatron"])
def test_peak(request: pytest.FixtureRequest, tmp_path: Path, source: str, job: str) -> None:
    src = request.getfixturevalue(source)
    words = [w.format(src=src, out=tmp_path, tok=TRAINED / "hf") for w in JOBS[job]]
    words += ["--max-memory", BUDGET, "--threads", "4", "--vocab-size", str(VOCAB)]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak
    assert int(peak[1]) * 1024 < LIMIT
