"""Adapters merged lazily: the fixture, PEFT's own merge of every variant, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mconv.errors import ConfigError, FormatError, MconvError, UnsupportedError
from mconv.shardio.low_rank import LowRank
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.tensor import from_array

from .formats.torch_cases import assert_equals_truth, load_truth, writable_copy

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers


def test_equals_truth(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "torch" / "peft_lora"
    checkpoint = open_checkpoint(folder / "ckpt/base", adapter=folder / "ckpt/adapter")
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))
    assert "LoRA adapter adapter is merged: 8 updates" in checkpoint.warnings[-1]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_any_region_is_that_of_the_whole(dora: bool, dtype: Any) -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((130, 5011)).astype(dtype)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((64, 5011), (130, 64)))
    magnitude = from_array(rng.random(130).astype(np.float32)) if dora else None
    node = LowRank(from_array(w), from_array(a), from_array(b), 0.25, magnitude)
    whole = node.read()
    exact = w.astype(np.float64) + 0.25 * (b.astype(np.float64) @ a)
    if magnitude is not None:
        exact *= (magnitude.read() / np.linalg.norm(exact, axis=1))[:, None]
    bits = 8 if dtype is ml_dtypes.bfloat16 else 17
    assert np.allclose(whole.astype(np.float64), exact, rtol=2.0**-bits, atol=2.0**-bits)
    for _ in range(12):
        r0, r1 = sorted(rng.integers(0, 131, 2))
        c0, c1 = sorted(rng.integers(0, 5012, 2))
        part = node.read([slice(r0, r1), slice(c0, c1)])
        assert part.tobytes() == whole[r0:r1, c0:c1].tobytes()


def _base(transformers: Any, kind: str) -> Any:
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=48)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=48, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
}


def _trained(peft: Any, torch: Any, model: Any, settings: dict[str, Any], folder: Path) -> Any:
    """Save the base and an adapter with random weights; return PEFT's merge."""
    torch.manual_seed(1)
    model.save_pretrained(folder / "base")
    defaults = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **settings}))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(folder / "adapter")
    return wrapped.merge_and_unload()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_merge_of_peft(tmp_path: Path, variant: str) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = _base(pytest.importorskip("transformers"), "llama")
    merged = _trained(peft, torch, model, VARIANTS[variant], tmp_path)
    checkpoint = open_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter")
    expected = {n: t.detach().numpy() for n, t in merged.state_dict().items()}
    assert set(checkpoint.weights) == set(expected)
    for name, value in expected.items():
        assert np.allclose(checkpoint.weights[name].read(), value, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("dora", [False, True])
def test_transposed_weights(tmp_path: Path, dora: bool) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = _base(pytest.importorskip("transformers"), "gpt2")
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": dora}
    merged = _trained(peft, torch, model, settings, tmp_path)
    checkpoint = open_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter")
    name = "transformer.h.1.attn.c_attn.weight"
    tensor = checkpoint.weights[name]
    expected = merged.state_dict()[name].numpy()
    assert np.allclose(tensor.read(), expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(tensor.read([slice(3, 9)]), expected[3:9], rtol=1e-5, atol=1e-6)


def test_adapter_folder_finds_its_base(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = writable_copy(fixtures_dir / "torch/peft_lora/ckpt", tmp_path / "c")
    with pytest.raises(UnsupportedError, match="--adapter"):
        open_checkpoint(folder / "adapter")
    _change(folder, base_model_name_or_path=str(folder / "base"))
    truth = load_truth(fixtures_dir / "torch/peft_lora/truth.safetensors")
    assert_equals_truth(open_checkpoint(folder / "adapter"), truth)
    _change(folder, base_model_name_or_path=str(folder / "adapter"))
    with pytest.raises(UnsupportedError, match="adapter itself"):
        open_checkpoint(folder / "adapter")


# -- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def copy(fixtures_dir: Path, tmp_path: Path) -> Path:
    return writable_copy(fixtures_dir / "torch/peft_lora/ckpt", tmp_path / "c")


def _change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "IA3"),
        ({"target_parameters": ["experts"]}, UnsupportedError, "fused experts"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "pissa_niter_4"),
        ({"layer_replication": [[0, 2]]}, UnsupportedError, "replicated layers"),
        ({"use_dora": True}, ConfigError, "lora_magnitude_vector"),
        ({"r": 8}, ConfigError, "do not belong together"),
        ({"lora_alpha": None}, ConfigError, "lora_alpha"),
    ],
)
def test_settings_are_refused(
    copy: Path, settings: dict[str, Any], error: type[MconvError], match: str
) -> None:
    _change(copy, **settings)
    with pytest.raises(error, match=match):
        open_checkpoint(copy / "base", adapter=copy / "adapter")


def _rename(copy: Path, change: dict[str, str]) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = copy / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    for old, new in change.items():
        value = tensors.pop(old)
        if new:
            tensors[new] = value
    safetensors.save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def test_half_a_pair(copy: Path) -> None:
    _rename(copy, {Q.format("B"): ""})
    with pytest.raises(FormatError, match="two matrices"):
        open_checkpoint(copy / "base", adapter=copy / "adapter")


def test_another_model(copy: Path) -> None:
    _rename(copy, {Q.format(x): Q.format(x).replace("layers.0", "layers.7") for x in "AB"})
    with pytest.raises(FormatError, match="another model"):
        open_checkpoint(copy / "base", adapter=copy / "adapter")


def test_wrong_shapes(copy: Path) -> None:
    _rename(copy, {Q.format(x): Q.format(x).replace("q_proj", "k_proj") for x in "AB"})
    with pytest.raises(FormatError, match="do not fit"):
        open_checkpoint(copy / "base", adapter=copy / "adapter")


def test_unknown_parts(copy: Path) -> None:
    _rename(copy, {Q.format("A"): Q.format("xa")})
    with pytest.raises(UnsupportedError, match="lora_xa"):
        open_checkpoint(copy / "base", adapter=copy / "adapter")


def test_no_adapter(copy: Path) -> None:
    with pytest.raises(MconvError, match="adapter_config"):
        open_checkpoint(copy / "base", adapter=copy / "base")
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match="neither"):
        open_checkpoint(copy / "base", adapter=copy / "adapter")
