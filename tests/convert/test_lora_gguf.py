"""PEFT adapters as GGUF: llama.cpp's own converter's files, and what llama.cpp makes of them.

The digests of ``tests/fixtures/lora_digests.json`` were recorded with it. Base and factors of the
GGUF files must make the model that merging the adapter makes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.gguf import open_gguf
from mconv.convert.lora_gguf import lora_to_gguf
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError, FormatError, MconvError, UnsupportedError
from mconv.shardio import open_checkpoint
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_adapters
import tiny_archs

FIXTURES = Path(__file__).parent.parent / "fixtures"
RECORDS = json.loads((FIXTURES / "arch_digests.json").read_text())
DIGESTS = json.loads((FIXTURES / "lora_digests.json").read_text())


def base(folder: Path, data: Path, name: str) -> dict[str, np.ndarray]:
    (folder / "m").mkdir(parents=True)
    tiny_archs.write_recorded(RECORDS[name], folder / "m", data, name)
    weights = load_file(folder / "m" / "model.safetensors")
    return {key: value.astype(np.float32) for key, value in weights.items()}


@pytest.mark.parametrize("name", tiny_adapters.TARGETS)
def test_files_are_the_official_converters(tmp_path: Path, data_dir: Path, name: str) -> None:
    adapter = tmp_path / "tiny-lora-v1"
    tiny_adapters.save_adapter(adapter, base(tmp_path, data_dir, name), tiny_adapters.TARGETS[name])
    for kind in ("f32", "q8_0"):
        lora_to_gguf(adapter, tmp_path / f"{kind}.gguf", kind, base=tmp_path / "m")
        made = hashlib.sha256((tmp_path / f"{kind}.gguf").read_bytes()).hexdigest()
        assert made == DIGESTS[f"{name}-{kind}"]


def applied(model: Path, adapter: Path) -> dict[str, np.ndarray]:
    """Return the weights that llama.cpp makes of a base and an adapter."""
    whole, low = open_gguf(model), open_gguf(adapter)
    assert (low["general.type"], low["adapter.type"]) == ("adapter", "lora")
    alpha, out = float(low["adapter.lora.alpha"]), {}
    for name in whole.tensors:
        weight = whole.array(name).astype(np.float64)
        if f"{name}.lora_a" in low.tensors:
            a, b = (low.array(f"{name}.lora_{x}").astype(np.float64) for x in "ab")
            if name == "token_embd.weight":
                weight = weight + alpha / b.shape[-1] * (b @ a.T).T
            else:
                weight = weight + alpha / b.shape[-1] * (b @ a)
        out[name] = weight
    return out


CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((name, pattern, {}) for name, pattern in tiny_adapters.TARGETS.items()),
    ("mixtral", r"[qkv]_proj$", {"use_rslora": True}),
    ("mixtral", r"[qkv]_proj$", {"alpha_pattern": {"k_proj": 3}, "rank_pattern": {"q_proj": 2}}),
    ("phi3", r"(qkv_proj|o_proj)$", {"use_rslora": True, "rank_pattern": {"o_proj": 8}}),
    ("gpt2", r"(c_attn|c_proj|c_fc)$", {"turned": True}),
]


@pytest.mark.parametrize(("name", "pattern", "settings"), CASES)
def test_base_and_adapter_make_the_merged_model(
    tmp_path: Path, data_dir: Path, name: str, pattern: str, settings: dict[str, Any]
) -> None:
    tiny_adapters.save_adapter(tmp_path / "a", base(tmp_path, data_dir, name), pattern, **settings)
    lora_to_gguf(tmp_path / "a", tmp_path / "a.gguf", base=tmp_path / "m")
    to_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")
    # the recorded weights are bfloat16, so merging rounds them
    merged = open_checkpoint(tmp_path / "m", adapter=tmp_path / "a")
    to_gguf(merged, tmp_path / "merged.gguf", "f32")
    found, want = (
        applied(tmp_path / "m.gguf", tmp_path / "a.gguf"),
        open_gguf(tmp_path / "merged.gguf"),
    )
    changed = 0
    for key, weight in found.items():
        truth = want.array(key).astype(np.float64)
        np.testing.assert_allclose(weight, truth, rtol=2**-8, atol=2**-8, err_msg=key)
        changed += f"{key}.lora_a" in open_gguf(tmp_path / "a.gguf").tensors
    assert changed > 1


def test_embeddings_and_norms(tmp_path: Path, data_dir: Path) -> None:
    weights = base(tmp_path, data_dir, "mixtral")
    table = weights["model.embed_tokens.weight"]
    random, at = np.random.default_rng(5), "base_model.model.model"
    extra = {
        f"{at}.embed_tokens.lora_embedding_A": random.normal(size=(4, len(table))),
        f"{at}.embed_tokens.lora_embedding_B": random.normal(size=(table.shape[1], 4)),
        f"{at}.layers.0.input_layernorm.weight": np.full(table.shape[1], 2.5),
    }
    extra = {key: value.astype(np.float32) for key, value in extra.items()}
    tiny_adapters.save_adapter(tmp_path / "a", weights, "q_proj$", extra=extra)
    lora_to_gguf(tmp_path / "a", tmp_path / "a.gguf", base=tmp_path / "m" / "config.json")
    to_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")
    a, b = (extra[f"{at}.embed_tokens.lora_embedding_{x}"] for x in "AB")
    found = applied(tmp_path / "m.gguf", tmp_path / "a.gguf")
    np.testing.assert_allclose(
        found["token_embd.weight"], table + 1.5 * (b @ a).T, rtol=1e-5, atol=1e-5
    )
    low = open_gguf(tmp_path / "a.gguf")
    assert (low.array("blk.0.attn_norm.weight") == 2.5).all()


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"use_dora": True}, UnsupportedError, "DoRA.*--adapter"),
        (
            {"extra": {"base_model.model.lm_head.weight": np.ones((601, 64), np.float32)}},
            UnsupportedError,
            "modules_to_save.*--adapter",
        ),
        (
            {"extra": {"base_model.model.model.x.lora_A.weight": np.ones((4, 64), np.float32),
                       "base_model.model.model.x.lora_B.weight": np.ones((64, 4), np.float32)}},
            FormatError,
            "model.x.weight, which a llama model",
        ),
        ({"lora_alpha": "x"}, ConfigError, "lora_alpha"),
        ({"peft_type": "IA3"}, UnsupportedError, "IA3"),
    ],
)  # fmt: skip
def test_refusals(
    tmp_path: Path, data_dir: Path, settings: dict[str, Any], error: type[MconvError], text: str
) -> None:
    tiny_adapters.save_adapter(
        tmp_path / "a", base(tmp_path, data_dir, "mixtral"), "q_proj$", **settings
    )
    with pytest.raises(error, match=text):
        lora_to_gguf(tmp_path / "a", tmp_path / "a.gguf", base=tmp_path / "m")
    assert not (tmp_path / "a.gguf").exists()


def test_some_experts_and_latent_attention(tmp_path: Path, data_dir: Path) -> None:
    weights = base(tmp_path, data_dir, "mixtral")
    tiny_adapters.save_adapter(tmp_path / "a", weights, r"experts\.[01]\.w1$")
    with pytest.raises(UnsupportedError, match="some experts"):
        lora_to_gguf(tmp_path / "a", tmp_path / "a.gguf", base=tmp_path / "m")
    weights = base(tmp_path / "d", data_dir, "deepseek2-v3")
    tiny_adapters.save_adapter(tmp_path / "b", weights, "kv_b_proj$")
    with pytest.raises(UnsupportedError, match=r"split_kv_b.*--adapter"):
        lora_to_gguf(tmp_path / "b", tmp_path / "a.gguf", base=tmp_path / "d" / "m")


def test_command(tmp_path: Path, data_dir: Path) -> None:
    tiny_adapters.save_adapter(tmp_path / "my-lora", base(tmp_path, data_dir, "mixtral"), "q_proj$")
    (tmp_path / "out").mkdir()
    line = ["to-gguf", str(tmp_path / "my-lora"), str(tmp_path / "out"), "--lora"]
    bad = CliRunner().invoke(cli, line)
    assert isinstance(bad.exception, ConfigError) and "--base" in str(bad.exception)
    line += ["--base", str(tmp_path / "m"), "--set", "general.author=me", "--name", "Mine"]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 0, done.output
    [path] = (tmp_path / "out").iterdir()
    assert path.name == "Mine-F32-LoRA.gguf" and open_gguf(path)["general.author"] == "me"
