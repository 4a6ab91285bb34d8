"""GGUF back to Hugging Face: the same GGUF again, the same tensors, the same tokenizer.

Models are those of ``tests/fixtures/arch_digests.json`` (no framework needed); what transformers
makes of the folders is in ``test_from_gguf_transformers.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.architectures import Stored, architectures, restored_config
from mconv.convert.architectures._llama_like import rope_freqs
from mconv.convert.from_gguf import from_gguf
from mconv.convert.gguf import open_gguf
from mconv.convert.quantize import QuantizeOptions, quantize_gguf
from mconv.convert.reshard import reshard
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError, MconvError, UnsupportedError
from mconv.shardio import Layout
from mconv.shardio.stream import Limits
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_archs

RECORDS = json.loads((Path(__file__).parent.parent / "fixtures" / "arch_digests.json").read_text())
NAMES = [
    "deepseek2-v3",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "gpt-oss-mxfp4",
    "gpt2",
    "gptneox",
    "mixtral",
    "phi3",
    "phi3-long",
    "qwen3moe",
    # beyond the families everybody uses
    "cohere2",
    "command-r",
    "gemma",
    "granite",
    "granitemoe-shared",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "qwen2moe",
    "smollm3",
    "starcoder2",
]


def there_and_back(folder: Path, data: Path, name: str, kind: str) -> Path:
    """Write folder/m, folder/kind.gguf and folder/kind/m; return the last."""
    source = folder / "m"
    if not source.exists():
        source.mkdir()
        tiny_archs.write_recorded(RECORDS[name], source, data, name)
    to_gguf(source, folder / f"{kind}.gguf", kind, force=True)
    report = from_gguf(folder / f"{kind}.gguf", folder / kind / "m")
    assert report.differences == ()
    return report.target


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_bit_for_bit_both_ways(tmp_path: Path, data_dir: Path, name: str) -> None:
    target = there_and_back(tmp_path, data_dir, name, "bf16")
    to_gguf(target, tmp_path / "again.gguf", "bf16")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "bf16.gguf").read_bytes()
    before = load_file(tmp_path / "m" / "model.safetensors")
    after = load_file(target / "model.safetensors")
    assert set(before) == set(after)
    for key, values in before.items():
        assert values.dtype == after[key].dtype, key
        np.testing.assert_array_equal(values.view(np.uint8), after[key].view(np.uint8), key)


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", ["gemma2", "gpt-oss-mxfp4", "phi3-long", "mixtral"])
def test_other_types_give_the_same_file(
    tmp_path: Path, data_dir: Path, name: str, kind: str
) -> None:
    target = there_and_back(tmp_path, data_dir, name, kind)
    to_gguf(target, tmp_path / "again.gguf", kind)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / f"{kind}.gguf").read_bytes()


def test_quantized_and_split(tmp_path: Path, data_dir: Path) -> None:
    there_and_back(tmp_path, data_dir, "mixtral", "f32")
    options = QuantizeOptions(max_shard_size=60_000)
    quantize_gguf(tmp_path / "f32.gguf", tmp_path / "q.gguf", ["Q8_0"], options)
    first = min(tmp_path.glob("q-00001-of-*.gguf"))
    report = from_gguf(first, tmp_path / "q", max_shard_size=100_000, limits=Limits(8 << 20, 2))
    assert report.differences == () and "Q8_0" in report.warnings[0]
    assert sum(name.startswith("model-0000") for name in report.files) > 2
    exact = from_gguf(first, tmp_path / "q32", dtype="f32")
    assert exact.dtype == "float32"
    values = load_file(tmp_path / "q32" / "model.safetensors")
    truth = load_file(tmp_path / "m" / "model.safetensors")
    for key, tensor in truth.items():
        assert values[key].dtype == np.float32
        assert np.abs(values[key] - tensor.astype(np.float32)).max() < 0.01


def test_own_config_and_tokenizer(tmp_path: Path, data_dir: Path) -> None:
    there_and_back(tmp_path, data_dir, "phi3", "bf16")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "mine": 3}))
    report = from_gguf(
        tmp_path / "bf16.gguf",
        tmp_path / "own" / "m",
        config=tmp_path / "m",
        tokenizer=tmp_path / "m",
    )
    assert report.differences == ()
    assert json.loads((report.target / "config.json").read_text())["mine"] == 3
    raw = (tmp_path / "m" / "tokenizer.model").read_bytes()
    assert (report.target / "tokenizer.model").read_bytes() == raw


CARD = """---
name: Good Model
version: 1.5
license: other
license_name: mine
base_model: [someone/Base-7B]
datasets: [a/b]
tags: [x, text]
language: [en, "no"]
---
"""


def test_card_and_sampling_come_back(tmp_path: Path, data_dir: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    tiny_archs.write_recorded(RECORDS["gpt2"], source, data_dir, "gpt2")
    (source / "README.md").write_text(CARD)
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    (source / "generation_config.json").write_text(json.dumps(sampling))
    to_gguf(source, tmp_path / "a.gguf", "bf16")
    report = from_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert report.differences == ()
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["do_sample"] is True and settings.items() >= sampling.items()
    to_gguf(tmp_path / "out", tmp_path / "b.gguf", "bf16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_what_would_differ_is_told(tmp_path: Path, data_dir: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    tiny_archs.write_recorded(RECORDS["gpt2"], source, data_dir, "gpt2")
    options = QuantizeOptions(override_kv=("my.key=int:3", "general.url=str:http://x"))
    to_gguf(source, tmp_path / "a.gguf", "bf16", quantization=options)
    report = from_gguf(tmp_path / "a.gguf", tmp_path / "tiny-v2-7b", dry_run=True)
    told = {line.partition(":")[0] for line in report.differences}
    assert told >= {"my.key", "general.url"}
    assert "general.basename: would be added" in report.differences, "from the folder's name"
    assert not (tmp_path / "tiny-v2-7b").exists()


@pytest.mark.parametrize(
    ("low", "high", "context", "factor"),
    [(1.0, 4.0, 8192, 8.0), (1.0, 4.0, 8192, 32.0), (1.0, 4.0, 64, 8.0), (1.0, 3.0, 5000, 4.0)],
)
@pytest.mark.parametrize("dim", [64, 128])
def test_llama3_rope_is_found_again(
    low: float, high: float, context: int, factor: float, dim: int
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    shape = {"hidden_size": dim, "num_attention_heads": 1, "head_dim": dim}
    divisors = rope_freqs({**shape, "rope_parameters": {**scaling, "rope_theta": 500000.0}})
    assert divisors is not None
    stored = stored_llama(dim, divisors)
    found = restored_config(architectures()["llama"], stored)["rope_scaling"]
    assert found == scaling


def stored_llama(dim: int, divisors: np.ndarray) -> Stored:
    keys = {
        "block_count": 2, "context_length": 131072, "embedding_length": dim,
        "attention.head_count": 1, "rope.freq_base": 500000.0,
    }  # fmt: skip
    return Stored(keys, {"rope_freqs.weight": divisors.shape}, lambda name: divisors)


def test_foreign_divisors_are_refused() -> None:
    with pytest.raises(ConfigError, match="--config"):
        restored_config(
            architectures()["llama"], stored_llama(64, np.linspace(1, 9, 32, dtype="f4"))
        )


@pytest.mark.parametrize("name", [n for n, r in architectures().items() if r.restore is not None])
def test_missing_keys_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match="metadata key"):
        restored_config(architectures()[name], Stored({}, {}, lambda tensor: np.empty(0)))


def test_refusals(tmp_path: Path, data_dir: Path) -> None:
    there_and_back(tmp_path, data_dir, "gpt2", "bf16")
    override = QuantizeOptions(override_kv=("general.architecture=str:rwkv7",))
    quantize_gguf(tmp_path / "bf16.gguf", tmp_path / "odd.gguf", ["COPY"], override)
    with pytest.raises(UnsupportedError, match="rwkv7"):
        from_gguf(tmp_path / "odd.gguf", tmp_path / "x")
    override = QuantizeOptions(override_kv=("gpt2.block_count=int:3",))
    quantize_gguf(tmp_path / "bf16.gguf", tmp_path / "odd2.gguf", ["COPY"], override)
    with pytest.raises(ConfigError, match=r"missing: blk\.2"):
        from_gguf(tmp_path / "odd2.gguf", tmp_path / "x")
    with pytest.raises(ConfigError, match="only a vocabulary"):
        from_gguf(data_dir / "vocab" / "ggml-vocab-gpt-2.gguf", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def run(*args: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in args])


def test_command(tmp_path: Path, data_dir: Path) -> None:
    there_and_back(tmp_path, data_dir, "gpt2", "bf16")
    dry = run("from-gguf", tmp_path / "bf16.gguf", tmp_path / "c", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "would write" in dry.output and not (tmp_path / "c").exists()
    done = run("from-gguf", tmp_path / "bf16.gguf", tmp_path / "c", "--json")
    assert done.exit_code == 0 and json.loads(done.output)["model"] == "GPT2LMHeadModel"
    assert (tmp_path / "c" / "tokenizer.json").exists()
    assert open_gguf(tmp_path / "bf16.gguf")["general.architecture"] == "gpt2"


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "deepseek2-v3", "gpt-oss-mxfp4"])
def test_reshard_reads_gguf_models_of_these_families(
    tmp_path: Path, data_dir: Path, name: str
) -> None:
    there_and_back(tmp_path, data_dir, name, "bf16")
    reshard(tmp_path / "bf16.gguf", tmp_path / "hf", Layout("hf", dtype="f32"))
    after = load_file(tmp_path / "hf" / "model.safetensors")
    for key, values in load_file(tmp_path / "m" / "model.safetensors").items():
        if not key.endswith(("_blocks", "_scales")):
            np.testing.assert_array_equal(after[key], values.astype(np.float32), key)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"]


@pytest.mark.parametrize(
    "override",
    [
        "mixtral.block_count=int:900000000",
        "llama.block_count=int:900000000",
        "llama.expert_count=int:2000000000",
        "llama.attention.head_count=int:0",
        "llama.embedding_length=int:0",
        "llama.attention.head_count_kv=int:7",
        "llama.attention.key_length=str:x",
        "llama.rope.freq_base=str:x",
        "llama.rope.scaling.type=str:yarn",
        "llama.context_length=float:1.5",
        "llama.attention.layer_norm_rms_epsilon=bool:true",
        "tokenizer.ggml.bos_token_id=int:99999999",
        "tokenizer.ggml.model=str:odd",
        "tokenizer.ggml.pre=str:odd",
    ],
)
def test_hostile_metadata(mixtral: Path, tmp_path: Path, override: str) -> None:
    options = QuantizeOptions(override_kv=(override,))
    quantize_gguf(mixtral, tmp_path / "odd.gguf", ["COPY"], options)
    if override.startswith("mixtral."):
        from_gguf(tmp_path / "odd.gguf", tmp_path / "x")
        return
    with pytest.raises(MconvError):
        from_gguf(tmp_path / "odd.gguf", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    there_and_back(folder, data_dir, "mixtral", "bf16")
    return folder / "bf16.gguf"
