"""Checkpoints to GGUF: values, types and metadata against transformers and the gguf package."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from mconv import open_checkpoint
from mconv.convert.gguf import open_gguf
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError, MconvError, OutputError, QuantError, UnsupportedError
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny

pytest.importorskip("torch")
pytest.importorskip("transformers")
KEEP = 600
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Path]:
    """All small models, with a cut-down tokenizer."""
    folders = {}
    for name in tiny.MODELS:
        folder = tmp_path_factory.mktemp("models") / f"tiny-{name}"
        vocab = data_dir / "vocab" / f"ggml-vocab-{'qwen2' if 'qwen' in name else 'llama-bpe'}.gguf"
        tiny.save_model(name, folder, tiny.save_bpe(vocab, folder, KEEP) + 5)
        folders[name] = folder
    return folders


def gguf_name(hf: str) -> str:
    stem, _, suffix = hf.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, rest = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{NAMES[rest]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def as_llamacpp_has_it(hf: str, value: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Interleave the rotary halves of query and key rows by plain indexing."""
    if config["model_type"] not in ("llama", "mistral") or ".mlp." in hf:
        return value
    if "q_proj" not in hf and "k_proj" not in hf:
        return value
    heads = config["num_attention_heads" if "q_proj" in hf else "num_key_value_heads"]
    size = len(value) // heads
    rows = [
        h * size + p + half * size // 2
        for h in range(heads)
        for p in range(size // 2)
        for half in (0, 1)
    ]
    return value[rows]


@pytest.mark.parametrize("name", list(tiny.MODELS))
@pytest.mark.parametrize("kind", list(TYPES))
def test_tensors(models: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    out = tmp_path / "m.gguf"
    report = to_gguf(models[name], out, kind)
    assert report.nbytes == out.stat().st_size and report.target == out
    config = json.loads((models[name] / "config.json").read_text())
    reader = gguf.GGUFReader(out)
    found = {t.name: t for t in reader.tensors}
    extra = {"rope_freqs.weight"} if name == "llama3" else set()
    weights = load_file(models[name] / "model.safetensors")
    assert set(found) == {gguf_name(n) for n in weights} | extra
    for hf, value in weights.items():
        tensor = found[gguf_name(hf)]
        want = as_llamacpp_has_it(hf, value, config).astype(np.float32)
        stored = TYPES[kind]
        if value.ndim == 1:
            stored = "F32"
        elif kind == "q8_0" and value.shape[-1] % 32:
            stored = "F16"
        assert tensor.tensor_type.name == stored, hf
        assert tuple(tensor.shape.tolist()) == value.shape[::-1]
        if stored in ("F32", "F16", "BF16"):
            got = dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
            assert (
                got.tobytes()
                == dequantize(quantize(want, tensor.tensor_type), tensor.tensor_type).tobytes()
            ), hf
        else:
            assert tensor.data.tobytes() == quantize(want, tensor.tensor_type).tobytes(), hf


def test_metadata_of_llama(models: dict[str, Path], tmp_path: Path) -> None:
    to_gguf(models["llama3"], tmp_path / "m.gguf", "bf16")
    found = open_gguf(tmp_path / "m.gguf")
    plain = {k: e.value for k, e in found.entries.items() if not k.startswith("tokenizer.")}
    vocab = json.loads((models["llama3"] / "config.json").read_text())["vocab_size"]
    rms = plain.pop("llama.attention.layer_norm_rms_epsilon")
    assert rms == pytest.approx(1e-6)
    assert plain == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny Llama3",
        "general.size_label": plain["general.size_label"],
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 500000.0,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "general.file_type": 32,
        "llama.vocab_size": vocab,
        "llama.rope.dimension_count": 32,
        "general.quantization_version": 2,
    }
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(found["tokenizer.ggml.tokens"]) == vocab
    assert found["tokenizer.ggml.tokens"][vocab - 1] == f"[PAD{vocab - 1}]"
    assert found["tokenizer.ggml.add_bos_token"] is True
    freqs = found.array("rope_freqs.weight")
    assert freqs.shape == (16,) and freqs[0] == 1.0 and freqs[-1] == 8.0
    assert (np.diff(freqs) >= 0).all() and (freqs[1:-1] != freqs[0]).any()


def test_model_card_and_generation_settings(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["llama"], tmp_path / "My-Model-Instruct-v0.2")
    card = "---\nlicense: mit\nlanguage:\n- en\nbase_model: org/Base-1B\ntags: [a, b]\n---\ntext\n"
    (folder / "README.md").write_text(card)
    settings = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    to_gguf(folder, tmp_path / "m.gguf", "q8_0")
    found = open_gguf(tmp_path / "m.gguf")
    assert found["general.license"] == "mit"
    assert list(found["general.tags"]) == ["a", "b"] and list(found["general.languages"]) == ["en"]
    assert found["general.base_model.0.name"] == "Base 1B"
    assert (found["general.finetune"], found["general.version"]) == ("Instruct", "v0.2")
    assert found["general.sampling.top_k"] == 20
    assert found["general.sampling.penalty_repeat"] == np.float32(1.05)
    (folder / "README.md").write_text("---\na: [\n---\n")
    refused(folder, tmp_path / "x.gguf", ConfigError, "README.md")


def test_yarn_metadata(models: dict[str, Path], tmp_path: Path) -> None:
    to_gguf(models["qwen2-yarn"], tmp_path / "m.gguf")
    found = open_gguf(tmp_path / "m.gguf")
    assert found["qwen2.rope.scaling.type"] == "yarn"
    assert found["qwen2.rope.scaling.factor"] == 4.0
    assert found["qwen2.rope.scaling.original_context_length"] == 64
    assert found["general.file_type"] == 1


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "F16"), ("mistral", "BF16"), ("llama-tied-biased", "F16")]
)
def test_auto_type(models: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    report = to_gguf(models[name], tmp_path / "m.gguf", "auto", dry_run=True)
    assert report.type == kind and not (tmp_path / "m.gguf").exists()


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def change(folder: Path, weights: dict[str, np.ndarray] | None = None, **config: Any) -> None:
    """Replace tensors (None removes) and configuration entries of a model folder."""
    if weights is not None:
        save_file(weights, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def refused(folder: Path, out: Path, error: type[MconvError], *texts: str, **options: Any) -> None:
    """Check that a conversion is refused with all texts and leaves nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error) as caught:
        to_gguf(folder, out, **options)
    for text in texts:
        assert text in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def test_all_problems_at_once(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["llama"], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["lm_head.weight"]
    weights["model.layers.0.mlp.odd_proj.weight"] = np.zeros((2, 2), np.float32)
    weights["model.layers.7.input_layernorm.weight"] = np.zeros(64, np.float32)
    weights["model.norm.weight"] = np.zeros(65, np.float32)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    change(folder, weights)
    refused(
        folder, tmp_path / "x.gguf", ConfigError,
        "5 tensors do not fit",
        "missing: model.layers.1.mlp.up_proj.weight",
        "missing: lm_head.weight",
        "unknown: model.layers.0.mlp.odd_proj.weight (did you mean",
        "unknown: model.layers.7.input_layernorm.weight (beyond the last layer)",
        "shape: model.norm.weight is [65], expected [64]",
    )  # fmt: skip


def test_vocabulary_and_embedding_disagree(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["llama"], tmp_path / "m")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    change(folder, vocab_size=size - 2)
    refused(folder, tmp_path / "x.gguf", ConfigError, "2 rows more", f"--vocab-size {size - 2}")
    change(folder, vocab_size=size + 2)
    refused(folder, tmp_path / "x.gguf", ConfigError, "fewer rows than vocab_size")


def test_other_refusals(models: dict[str, Path], tmp_path: Path) -> None:
    folder, out = copy(models["llama"], tmp_path / "m"), tmp_path / "x.gguf"
    refused(folder, out, ConfigError, "did you mean 'q8_0'", type="q8")
    change(folder, architectures=["LlamaForCausalLMs"])
    refused(folder, out, UnsupportedError, "did you mean 'LlamaForCausalLM'")
    change(folder, architectures=None, model_type="lama")
    refused(folder, out, UnsupportedError, "did you mean 'llama'")
    change(folder, model_type=None)
    refused(folder, out, ConfigError, "architectures")
    change(folder, model_type="llama", quantization_config={"quant_method": "gptq"})
    refused(folder, out, UnsupportedError, "gptq")
    change(folder, quantization_config=None)
    change(folder, architectures=["LlamaForCausalLM"], num_attention_heads=0)
    refused(folder, out, ConfigError, "num_attention_heads is 0")
    (folder / "tokenizer.json").unlink()
    change(folder, num_attention_heads=4)
    refused(folder, out, ConfigError, "--tokenizer")
    out.write_bytes(b"mine")
    refused(models["llama"], out, OutputError, "--force")
    assert out.read_bytes() == b"mine"


def test_f16_overflow_names_the_tensor(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["llama"], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    change(folder, weights)
    with pytest.raises(QuantError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        to_gguf(folder, tmp_path / "x.gguf", "f16")
    assert not (tmp_path / "x.gguf").exists()


def test_tokenizer_and_config_from_elsewhere(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["qwen3"], tmp_path / "m")
    other = tmp_path / "tok"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(other / name)
    (folder / "config.json").rename(tmp_path / "config.json")
    to_gguf(folder, tmp_path / "a.gguf", tokenizer=other, config=tmp_path / "config.json", name="N")
    to_gguf(models["qwen3"], tmp_path / "b.gguf", name="N")
    a, b = open_gguf(tmp_path / "a.gguf"), open_gguf(tmp_path / "b.gguf")
    skip = {"general.basename", "general.version", "general.finetune"}  # from the folder's name
    assert {k: str(e.value) for k, e in a.entries.items() if k not in skip} == {
        k: str(e.value) for k, e in b.entries.items() if k not in skip
    }
    for name in b.tensors:
        np.testing.assert_array_equal(a.raw(name), b.raw(name))


def fixed_model(folder: Path, model: Path) -> None:
    """Write a model of weights that numpy's generator makes, the same on every machine."""
    tiny.save_spm(model, folder)
    config = {
        **tiny.SIZES,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_parameters": tiny.LLAMA3_ROPE,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (32000, 64), "model.norm": (64,)}
    for n in range(2):
        shapes |= {
            f"model.layers.{n}.input_layernorm": (64,),
            f"model.layers.{n}.post_attention_layernorm": (64,),
            f"model.layers.{n}.self_attn.q_proj": (64, 64),
            f"model.layers.{n}.self_attn.k_proj": (32, 64),
            f"model.layers.{n}.self_attn.v_proj": (32, 64),
            f"model.layers.{n}.self_attn.o_proj": (64, 64),
            f"model.layers.{n}.mlp.gate_proj": (160, 64),
            f"model.layers.{n}.mlp.up_proj": (160, 64),
            f"model.layers.{n}.mlp.down_proj": (64, 160),
        }
    weights = {
        f"{name}.weight": (rng.integers(-999, 1000, shape) / 4096).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")


#: SHA-256 of the files that llama.cpp's own converter (source of 2026-09) writes for this model.
GOLDEN = {
    "f32": "41ddf8f9bdf4657acb7b6dd4e93d096c67feefcd607ecab1499cd8056ed3080d",
    "f16": "bb36263b2f84161d87cc51b89b050a42da511b00be34c921a043ce82c3fe4745",
    "bf16": "0baee07612d438a7b624a65b9cd729b4c6d785801b854d14982de937935fd52c",
    "q8_0": "3179636deb4ca96672398ee93ef14bb1198d2db78b47706dcbdc418c46713b86",
}


@pytest.mark.parametrize("kind", list(TYPES))
def test_golden_files_of_llamacpp(tmp_path: Path, data_dir: Path, kind: str) -> None:
    fixed_model(tmp_path / "golden-model", data_dir / "llama2-tokenizer.model")
    to_gguf(tmp_path / "golden-model", tmp_path / "m.gguf", kind)
    assert hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest() == GOLDEN[kind]


def test_opened_checkpoints_and_paths_give_the_same(
    models: dict[str, Path], tmp_path: Path
) -> None:
    to_gguf(models["qwen2"], tmp_path / "a.gguf", "q8_0")
    to_gguf(open_checkpoint(models["qwen2"]), tmp_path / "b.gguf", "q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
