"""Checkpoints straight to quantized GGUF: the same file as by way of a 16-bit one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.gguf import open_gguf
from mconv.convert.llamacpp import generate, have_llamacpp
from mconv.convert.quantize import QuantizeOptions, quantize_gguf
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError, MconvError, QuantError
from mconv.quant.recipes import RecipeOptions
from safetensors.numpy import save_file

from .tiny_gguf import Spec, heavy_tailed, write_imatrix

sys.path.insert(0, str(Path(__file__).parent))
import tiny

VOCAB = 328
RUN = ("F32", "Q6_K", "Q4_K_M", "IQ3_XXS", "IQ1_M", "TQ1_0", "MXFP4_MOE", "Q2_0")  # of each kind
SPEC = Spec(layers=4, embd=256, ff=256, heads=8, kv_heads=2)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "float16",
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    tiny.save_bpe(data_dir / "vocab" / "ggml-vocab-llama-bpe.gguf", folder, 320)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    bits = np.random.PCG64(3)
    shapes = {"model.embed_tokens": (VOCAB, 256), "lm_head": (VOCAB, 256), "model.norm": (256,)}
    for i in range(4):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj": (256, 256) for n in "qo"}
        shapes |= {f"{at}.self_attn.{n}_proj": (64, 256) for n in "kv"}
        shapes |= {f"{at}.mlp.{n}_proj": (256, 256) for n in ("gate", "up", "down")}
        shapes |= {f"{at}.{n}_layernorm": (256,) for n in ("input", "post_attention")}
    weights = {f"{n}.weight": heavy_tailed(bits, s).astype(np.float16) for n, s in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_same_file_as_in_two_steps(checkpoint: Path, tmp_path: Path) -> None:
    targets = ["Q4_K_M", "IQ3_M", "Q5_1", "IQ1_S"]
    matrix = write_imatrix(tmp_path / "i.gguf", SPEC)
    options = QuantizeOptions(imatrix=matrix, max_shard_size=300_000)
    to_gguf(checkpoint, tmp_path / "f16.gguf", "auto")
    quantize_gguf(tmp_path / "f16.gguf", tmp_path / "two-{type}.gguf", targets, options)
    kinds = ",".join([*targets, "q8_0"]).lower()
    report = to_gguf(checkpoint, tmp_path / "one-{type}.gguf", kinds, quantization=options)
    assert [one.type for one in (report, *report.more)] == [*targets, "Q8_0"]
    made = {p.name.removeprefix("two-"): p for p in tmp_path.glob("two-*")}
    assert len(made) > 4
    for name, path in made.items():
        assert path.read_bytes() == (tmp_path / f"one-{name}").read_bytes(), name
    assert sum((tmp_path / name).stat().st_size for name in report.files) == report.nbytes


def test_options_turn_a_plain_type_into_a_mix(checkpoint: Path, tmp_path: Path) -> None:
    recipe = RecipeOptions(tensor_types=(("attn_v", "Q6_K"),), leave_output=True)
    options = QuantizeOptions(recipe=recipe, override_kv=("general.name=str:Other",))
    to_gguf(checkpoint, tmp_path / "m.gguf", "q8_0", quantization=options)
    file = open_gguf(tmp_path / "m.gguf")
    kinds = {n: file.tensors[n].type.name for n in ("blk.0.attn_v.weight", "output.weight")}
    assert kinds == {"blk.0.attn_v.weight": "Q6_K", "output.weight": "F16"}
    assert (file["general.name"], file["general.file_type"]) == ("Other", 7)


def test_plain_types_do_not_change_in_company(checkpoint: Path, tmp_path: Path) -> None:
    to_gguf(checkpoint, tmp_path / "a.gguf", "bf16")
    to_gguf(checkpoint, tmp_path / "b.gguf", "bf16,q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b-BF16.gguf").read_bytes()
    assert open_gguf(tmp_path / "b-Q4_0.gguf")["general.file_type"] == 2


def test_refusals(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantError, match=r"IQ2_XS needs an importance matrix for blk\.0"):
        to_gguf(checkpoint, tmp_path / "m.gguf", "iq2_xs")
    with pytest.raises(ConfigError, match=r"unknown output type 'q4_k_x' \(did you mean 'q4_k"):
        to_gguf(checkpoint, tmp_path / "m.gguf", "q8_0,q4_k_x")
    with pytest.raises(ConfigError, match="mconv quantize"):
        to_gguf(checkpoint, tmp_path / "m.gguf", quantization=QuantizeOptions(prune_layers=(1,)))
    assert not list(tmp_path.iterdir())


def test_command(checkpoint: Path, tmp_path: Path) -> None:
    args = ["to-gguf", str(checkpoint), str(tmp_path / "m.gguf"), "--type", "q4_k_s,iq4_nl"]
    result = CliRunner().invoke(cli, [*args, "--output-tensor-type", "q8_0", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert [found["type"], found["more"][0]["type"]] == ["Q4_K_S", "IQ4_NL"]
    for name in ("m-Q4_K_S.gguf", "m-IQ4_NL.gguf"):
        assert open_gguf(tmp_path / name).tensors["output.weight"].type.name == "Q8_0"
    result = CliRunner().invoke(cli, [*args, "--tensor-type", "x"])
    assert isinstance(result.exception, MconvError)
    result = CliRunner().invoke(cli, [*args, "--force", "--tensor-type", "atn_q=q8_0"])
    assert isinstance(result.exception, QuantError) and "'attn_q'" in str(result.exception)
    result = CliRunner().invoke(cli, [*args, "--force", "--report", "--dry-run"])
    assert result.exit_code == 2 and "leave one of them out" in result.output


@pytest.mark.skipif(not have_llamacpp(), reason="xllamacpp is not installed")
def test_llamacpp_runs_the_files(checkpoint: Path, tmp_path: Path) -> None:
    """A file of each kind loads and speaks; one with many bits says what the exact model says."""
    options = QuantizeOptions(imatrix=write_imatrix(tmp_path / "i.gguf", SPEC))
    to_gguf(checkpoint, tmp_path / "{type}.gguf", ",".join(RUN), quantization=options)
    said = {kind: generate(tmp_path / f"{kind}.gguf", [5, 17, 99, 3], 4) for kind in RUN}
    for kind, words in said.items():
        assert len(words.tokens) >= 1, kind
        assert all(np.isfinite(words.logprobs)), kind
    assert said["Q6_K"].tokens[0] == said["F32"].tokens[0]
    assert abs(said["Q6_K"].logprobs[0] - said["F32"].logprobs[0]) < 0.05
