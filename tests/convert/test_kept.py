"""Quantized weights that go into GGUF as the blocks they are: the same numbers, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from mconv.convert.diff import diff
from mconv.convert.from_gguf import from_gguf
from mconv.convert.to_gguf import GgufReport, to_gguf

sys.path.insert(0, str(Path(__file__).parent))
import tiny
import tiny_quantized
from llamacpp import LlamaCpp

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

KEEP = 600
STEPS = 6
MARGIN = 0.5  # between the two most likely tokens, in logits of spread 4
PROMPTS = [[5, 17, 99, 3], [300, 301, 302, 303, 304, 305, 306, 307]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "m"
    size = tiny.save_bpe(data_dir / "vocab" / "ggml-vocab-llama-bpe.gguf", folder, KEEP)
    model = tiny.save_model("llama3", folder, size, **tiny_quantized.SIZES, head_dim=64)
    torch.manual_seed(5)
    for weight, spread in ((model.model.embed_tokens.weight, 1.0), (model.lm_head.weight, 0.25)):
        torch.nn.init.normal_(weight, 0.0, spread)  # clear choices, though activations are rounded
    model.save_pretrained(folder)
    return folder


def _values(path: Path) -> dict[str, np.ndarray]:
    """Every tensor in float32 by gguf-py, factors multiplied in."""
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    out = {}
    for name, t in tensors.items():
        shape = tuple(int(n) for n in reversed(t.shape))
        value = gguf.dequantize(t.data, t.tensor_type).reshape(shape).astype(np.float32)
        factor = tensors.get(name.removesuffix(".weight") + ".scale")
        if factor is not None and name.endswith(".weight"):
            value = value * factor.data.reshape(-1, *[1] * (value.ndim - 1))[..., :1]
        out[name] = value
    return {n: v for n, v in out.items() if not n.endswith("scale")}


def _same(kept: Path, exact: Path, kind: str) -> None:
    mine, truth = _values(kept), _values(exact)
    assert mine.keys() == truth.keys()
    for name, value in mine.items():
        if kind.startswith("nvfp4"):  # the factor comes last here, with the scale there
            assert np.allclose(value, truth[name], rtol=2e-7, atol=0), name
        else:
            assert value.tobytes() == truth[name].tobytes(), name


def _made(plain: Path, folder: Path, kind: str) -> tuple[Path, Path, GgufReport]:
    made = tiny_quantized.KINDS[kind]
    exact = tiny_quantized.quantize_folder(plain, folder / "q", made)
    to_gguf(exact, folder / "exact.gguf", "f32")
    return (folder / "keep.gguf", folder / "exact.gguf",
            to_gguf(folder / "q", folder / "keep.gguf", "keep"))  # fmt: skip


@pytest.mark.parametrize("kind", [k for k, made in tiny_quantized.KINDS.items() if made.types])
def test_the_same_numbers_and_tokens(tmp_path: Path, plain: Path, kind: str) -> None:
    kept, exact, report = _made(plain, tmp_path, kind)
    assert report.kept is not None
    assert report.kept.types == {tiny_quantized.KINDS[kind].types[0]: 14}
    assert not report.kept.decoded
    _same(kept, exact, kind)
    pytest.importorskip("xllamacpp")
    size = json.loads((plain / "config.json").read_text())["vocab_size"]
    _same_answers(LlamaCpp(kept), LlamaCpp(exact), size)


def _same_answers(kept: LlamaCpp, exact: LlamaCpp, size: int) -> None:
    """Greedy decoding step by step: the same tokens wherever the choice is clear.

    llama.cpp rounds what blocks are multiplied with to 8 bits, so a close call may differ.
    """
    clear = 0
    for prompt in PROMPTS:
        path = exact.greedy(prompt, STEPS, range(KEEP, size))
        for k in range(STEPS):
            truth, mine = (r.log_probabilities(prompt + path[:k], size) for r in (exact, kept))
            assert np.sqrt(np.mean((mine - truth) ** 2)) < 0.2 * truth.std()
            second, first = np.sort(truth)[-2:]
            if first - second > MARGIN:
                clear += 1
                assert np.argmax(mine) == np.argmax(truth)
    assert clear >= STEPS // 2


@pytest.mark.parametrize(("kind", "why"), [("gptq4-act-order", "order"), ("bnb8", "exact in f16")])
def test_what_no_type_holds_is_decoded(tmp_path: Path, plain: Path, kind: str, why: str) -> None:
    _, _, report = _made(plain, tmp_path, kind)
    assert report.kept is not None
    assert not report.kept.types
    assert len(report.kept.decoded) == 14
    assert all(why in reason for _, reason in report.kept.decoded)
    assert any("decoded" in line and why in line for line in report.warnings)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("experts") / "m"
    size = tiny.save_bpe(data_dir / "vocab" / "ggml-vocab-qwen2.gguf", folder, KEEP)
    config = transformers.Qwen3MoeConfig(
        vocab_size=size, **tiny_quantized.SIZES, head_dim=64, moe_intermediate_size=128,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(7)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gptq4", "awq", "nvfp4-compressed", "mxfp4"])
def test_stacked_experts(tmp_path: Path, experts: Path, kind: str) -> None:
    kept, exact, report = _made(experts, tmp_path, kind)
    assert report.kept is not None
    assert report.kept.types == {tiny_quantized.KINDS[kind].types[0]: 14}
    _same(kept, exact, kind)


@pytest.mark.parametrize("kind", ["nvfp4-modelopt", "gptq4"])
def test_only_its_own_formats_stay_unasked(tmp_path: Path, plain: Path, kind: str) -> None:
    tiny_quantized.quantize_folder(plain, tmp_path / "q", tiny_quantized.KINDS[kind])
    report = to_gguf(tmp_path / "q", tmp_path / "m.gguf", "bf16,keep", dry_run=True)
    assert report.kept is not None
    kept = {"NVFP4": 14} if kind.startswith("nvfp4") else {}
    assert report.kept.types == kept
    assert len(report.kept.decoded) == 14 - sum(kept.values())
    [other] = report.more
    assert other.kept is not None
    assert sum(other.kept.types.values()) == 14
    assert any("keep their bits" in line for line in other.warnings)


def _comes_back(source: Path, exact: Path, gguf_file: Path) -> None:
    """from-gguf gives the source's decoded values; diff finds the file and its source alike."""
    from safetensors.numpy import load_file

    back = gguf_file.with_name("back")
    report = from_gguf(gguf_file, back, dtype="f32")
    assert any("decoded" in line for line in report.warnings)
    mine, truth = ({} for _ in range(2))
    for folder, out in ((back, mine), (exact, truth)):
        for path in folder.glob("*.safetensors"):
            out |= load_file(path)
    assert mine.keys() == truth.keys()
    for name, value in mine.items():
        assert np.allclose(value, truth[name].astype(np.float32), rtol=2e-7, atol=0), name
    for other in (gguf_file, back):
        assert diff(other, exact).within(2e-7)
        assert diff(other, source, rounded=True).within(2**-8)  # it is decoded to bfloat16


@pytest.mark.parametrize("kind", ["nvfp4-modelopt", "nvfp4-compressed", "bitnet", "bitnet-auto"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside its config.json"])
def test_factors_come_back(tmp_path: Path, plain: Path, kind: str, beside: bool) -> None:
    kept, _, _ = _made(plain, tmp_path, kind)
    if beside:
        (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    _comes_back(tmp_path / "q", tmp_path / "q-exact", kept)


def test_factors_of_experts_come_back(tmp_path: Path, experts: Path) -> None:
    kept, _, _ = _made(experts, tmp_path, "nvfp4-compressed")
    _comes_back(tmp_path / "q", tmp_path / "q-exact", kept)
