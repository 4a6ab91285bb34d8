"""``mconv quantize``: files equal to llama-quantize's, every option, and clean failures."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.gguf import GgufFile, open_gguf
from mconv.convert.gguf.edit import parse_override
from mconv.convert.quantize import QuantizeOptions, quantize_gguf
from mconv.errors import ConfigError, FormatError, MconvError, OutputError, QuantError
from mconv.quant import dequantize, have_native, quantize
from mconv.quant.recipes import TARGETS, RecipeOptions
from mconv.shardio.stream import Limits

from .tiny_gguf import (
    MODELS,
    importance,
    metadata,
    values,
    write_dat,
    write_gguf,
    write_imatrix,
    write_model,
    write_split,
)

DIGESTS = json.loads(
    (Path(__file__).parent.parent / "fixtures" / "quantize_digests.json").read_text()
)
QUICK = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q6_K", "Q4_K_M", "COPY")  # without native kernels


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "in.gguf", MODELS["odd"])


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    file = open_gguf(path)
    return {n: (t.type.name, file.raw(n).tobytes()) for n, t in file.tensors.items()}


def leftovers(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("case", DIGESTS)
def test_files_equal_llama_quantize(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All targets of a model, made from one read, against the digests of that program's files."""
    name, kind = case.split()
    monkeypatch.chdir(tmp_path)
    write_model(Path("in.gguf"), MODELS[name])
    write_imatrix(Path("imatrix.gguf"), MODELS[name])
    options = QuantizeOptions(imatrix="imatrix.gguf" if kind == "imatrix" else None)
    digests = DIGESTS[case] if have_native() else {t: DIGESTS[case][t] for t in QUICK}
    wanted = [target for target, digest in digests.items() if digest]
    # one program gives up on these rows, the other finds a type for them
    assert set(digests) - set(wanted) <= refused(wanted, name, kind), digests
    quantize_gguf("in.gguf", "{type}.gguf", wanted, options)
    for target in wanted:
        made = hashlib.sha256(Path(f"{target}.gguf").read_bytes()).hexdigest()[:16]
        assert made == digests[target], target


def refused(wanted: list[str], name: str, kind: str) -> set[str]:
    """Targets that llama-quantize cannot make of a model."""
    low = {
        "IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"
    }  # fmt: skip
    return (low if kind == "plain" else set()) | ({"Q1_0"} if name == "odd" else set())


@pytest.mark.skipif("MCONV_LLAMA_QUANTIZE" not in os.environ, reason="no llama-quantize at hand")
@pytest.mark.parametrize("target", ["Q4_K_M", "IQ3_M", "Q5_0"])
def test_live_llama_quantize(target: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", MODELS["dense"], seed=9)
    theirs = tmp_path / "theirs.gguf"
    command = [os.environ["MCONV_LLAMA_QUANTIZE"], source, theirs, target]
    subprocess.run(command, check=True, capture_output=True)
    quantize_gguf(source, tmp_path / "ours.gguf", [target])
    assert theirs.read_bytes() == (tmp_path / "ours.gguf").read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [1 << 20, 1 << 30])
def test_bytes_do_not_depend_on_threads_or_memory(
    tmp_path: Path, threads: int, memory: int
) -> None:
    source = write_model(tmp_path / "in.gguf", MODELS["dense"])
    limits = Limits(max_memory=memory, threads=threads)
    quantize_gguf(source, tmp_path / "out.gguf", ["Q4_K_M"], limits=limits)
    made = hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest()[:16]
    assert made == DIGESTS["dense plain"]["Q4_K_M"]


def test_split_input_and_split_output(tmp_path: Path) -> None:
    spec = MODELS["odd"]
    whole = write_model(tmp_path / "in.gguf", spec)
    first = write_split(tmp_path, spec)
    quantize_gguf(whole, tmp_path / "a.gguf", ["Q4_K_M"])
    quantize_gguf(first, tmp_path / "b.gguf", ["Q4_K_M"])
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    cut = QuantizeOptions(max_shard_size=60_000)
    report = quantize_gguf(first, tmp_path / "c.gguf", ["Q4_K_M"], cut)
    files = sorted(report.outputs[0].files)
    assert len(files) > 2
    assert tensors(files[1]) == tensors(tmp_path / "a.gguf")
    assert open_gguf(files[0]).get("split.count") == len(files)
    quantize_gguf(first, tmp_path / "d.gguf", ["Q4_K_M"], QuantizeOptions(keep_split=True))
    kept = open_gguf(tmp_path / "d-00001-of-00003.gguf")
    source = open_gguf(first)
    for name, info in kept.tensors.items():
        assert info.path.name[1:] == source.tensors[name].path.name[1:]
    with pytest.raises(ConfigError, match="exclude each other"):
        quantize_gguf(
            first, tmp_path / "e.gguf", ["Q8_0"], QuantizeOptions(keep_split=True, max_shard_size=9)
        )


def test_quantized_input_is_decoded_slab_by_slab(tmp_path: Path, model: Path) -> None:
    quantize_gguf(model, tmp_path / "q8.gguf", ["Q8_0"])
    with pytest.raises(QuantError, match=r"already quantized \(Q8_0\).*--allow-requantize"):
        quantize_gguf(tmp_path / "q8.gguf", tmp_path / "q4.gguf", ["Q4_0"])
    options = QuantizeOptions(allow_requantize=True)
    quantize_gguf(tmp_path / "q8.gguf", tmp_path / "q4.gguf", ["Q4_0"], options)
    file, made = open_gguf(tmp_path / "q8.gguf"), tensors(tmp_path / "q4.gguf")
    name = "blk.1.attn_q.weight"
    again = quantize(
        dequantize(file.raw(name), "Q8_0", file.tensors[name].shape), made[name][0]
    )  # fmt: skip
    assert made[name] == ("Q4_0", again.tobytes())
    quantize_gguf(tmp_path / "q8.gguf", tmp_path / "f32.gguf", ["F32"])  # decoding needs no leave
    assert tensors(tmp_path / "f32.gguf")[name][0] == "F32"


def test_pruned_layers_are_renumbered_with_their_importance(tmp_path: Path) -> None:
    spec = MODELS["moe"]
    per_layer = np.arange(spec.layers, dtype=np.int32)
    from mconv.convert.gguf.values import i32_array

    entries = [*metadata(spec), i32_array(f"{spec.arch}.per_layer", per_layer)]
    source = write_gguf(tmp_path / "in.gguf", entries, values(spec))
    matrix = write_imatrix(tmp_path / "i.gguf", spec)
    options = QuantizeOptions(imatrix=matrix, prune_layers=(0, 5))
    quantize_gguf(source, tmp_path / "out.gguf", ["Q3_K_S"], options)
    out = open_gguf(tmp_path / "out.gguf")
    assert out["qwen3moe.block_count"] == 14
    assert list(out["qwen3moe.per_layer"]) == [1, 2, 3, 4, *range(6, 16)]
    for new, old in [(0, 1), (3, 4), (4, 6), (13, 15)]:
        x = values(spec)[f"blk.{old}.attn_q.weight"]
        sums, counts = importance(spec)[f"blk.{old}.attn_q.weight"]
        expected = quantize(x, "Q3_K", sums[0] / counts[0])
        np.testing.assert_array_equal(out.raw(f"blk.{new}.attn_q.weight"), expected.reshape(-1))
    assert "blk.14.attn_q.weight" not in out.tensors
    for layers, problem in [((16,), "0 to 15"), (tuple(range(16)), "leaves no model")]:
        with pytest.raises(ConfigError, match=problem):
            quantize_gguf(
                source, tmp_path / "x.gguf", ["Q8_0"], QuantizeOptions(prune_layers=layers)
            )


def test_output_names(tmp_path: Path, model: Path) -> None:
    quantize_gguf(model, tmp_path / "m.gguf", ["q8_0", "F16", "Q8_0"])
    (tmp_path / "folder").mkdir()
    quantize_gguf(model, tmp_path / "folder", ["Q8_0"])
    quantize_gguf(model, tmp_path / "a-{type}-b.gguf", ["Q8_0"])
    assert leftovers(tmp_path) == {
        "in.gguf", "m-Q8_0.gguf", "m-F16.gguf", "folder", "a-Q8_0-b.gguf"
    }  # fmt: skip
    assert leftovers(tmp_path / "folder") == {"in-Q8_0.gguf"}
    with pytest.raises(ConfigError, match=r"name a \.gguf file, or an existing folder"):
        quantize_gguf(model, tmp_path / "m.bin", ["Q8_0"])
    with pytest.raises(OutputError, match="is the input"):
        quantize_gguf(model, model, ["Q8_0"], force=True)
    with pytest.raises(OutputError, match="exists; use --force"):
        quantize_gguf(model, tmp_path / "m.gguf", ["Q8_0", "Q4_0"])


@pytest.mark.parametrize("target", ["Q4_K_M", "F16", "BF16"])
@pytest.mark.parametrize("name", ["blk.3.ffn_up.weight", "blk.3.attn_norm.weight"])
def test_nan_is_named_and_nothing_is_left(tmp_path: Path, target: str, name: str) -> None:
    arrays = values(MODELS["odd"])
    arrays[name].reshape(-1)[5] = np.nan
    source = write_gguf(tmp_path / "in.gguf", metadata(MODELS["odd"]), arrays)
    with pytest.raises(QuantError, match=f"'{name}', row 0, column 5: the value is nan"):
        quantize_gguf(source, tmp_path / "out.gguf", [target])
    assert leftovers(tmp_path) == {"in.gguf"}


def test_missing_importance_names_tensors(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", MODELS["moe"])
    with pytest.raises(QuantError, match=r"IQ2_XXS needs an importance matrix for blk\.0.* more"):
        quantize_gguf(source, tmp_path / "out.gguf", ["Q8_0", "IQ2_XXS"])
    matrix = write_imatrix(tmp_path / "i.gguf", MODELS["moe"])
    options = QuantizeOptions(imatrix=matrix, exclude_weights=("blk.7.attn_q",))
    with pytest.raises(QuantError, match=r"for blk\.7\.attn_q\.weight \(as IQ2_XXS\)"):
        quantize_gguf(source, tmp_path / "out.gguf", ["IQ2_XXS"], options)
    pure = QuantizeOptions(imatrix=matrix, recipe=RecipeOptions(pure=True))
    with pytest.raises(QuantError, match=r"for output\.weight, token_embd\.weight"):
        quantize_gguf(source, tmp_path / "out.gguf", ["IQ2_XXS"], pure)
    assert leftovers(tmp_path) == {"in.gguf", "i.gguf"}


def test_importance_of_another_model(tmp_path: Path, model: Path) -> None:
    matrix = write_dat(tmp_path / "i.dat", MODELS["dense"])
    with pytest.raises(FormatError, match=r"blk\.0\.attn_k\.weight' has 256 values"):
        quantize_gguf(model, tmp_path / "o.gguf", ["Q4_K_M"], QuantizeOptions(imatrix=matrix))
    options = QuantizeOptions(include_weights=("attn",))
    with pytest.raises(ConfigError, match="need --imatrix"):
        quantize_gguf(model, tmp_path / "o.gguf", ["Q4_K_M"], options)


def test_warnings(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", MODELS["dense"])
    matrix = write_imatrix(tmp_path / "i.gguf", MODELS["dense"])
    options = QuantizeOptions(imatrix=matrix, include_weights=("ffn",))
    report = quantize_gguf(source, tmp_path / "o.gguf", ["Q4_K_M"], options, dry_run=True)
    assert any("no entry for blk.0.attn_k.weight" in w for w in report.warnings)
    odd = write_model(tmp_path / "odd.gguf", MODELS["odd"])
    report = quantize_gguf(odd, tmp_path / "o.gguf", ["Q4_K_M"], dry_run=True)
    assert any("tensors got another type" in w for w in report.warnings)
    assert leftovers(tmp_path) == {"in.gguf", "i.gguf", "odd.gguf"}


def test_truncated_input(tmp_path: Path, model: Path) -> None:
    model.write_bytes(model.read_bytes()[:-5000])
    with pytest.raises(FormatError, match="truncated"):
        quantize_gguf(model, tmp_path / "o.gguf", ["Q8_0"])
    assert leftovers(tmp_path) == {"in.gguf"}


def test_interrupted_run_resumes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", MODELS["dense"])

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    small = Limits(max_memory=1 << 20, threads=1)
    with pytest.raises(KeyboardInterrupt):
        quantize_gguf(source, tmp_path / "o.gguf", ["Q8_0"], limits=small, progress=stop)
    assert not (tmp_path / "o.gguf").exists()
    with pytest.raises(OutputError, match="other sources or options"):
        quantize_gguf(source, tmp_path / "o.gguf", ["Q4_0"], resume=True)
    quantize_gguf(source, tmp_path / "o.gguf", ["Q8_0"], resume=True)
    made = hashlib.sha256((tmp_path / "o.gguf").read_bytes()).hexdigest()[:16]
    assert made == DIGESTS["dense plain"]["Q8_0"]
    assert leftovers(tmp_path) == {"in.gguf", "o.gguf"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=int:7", 7),
        ("a.b=int:-7", -7),
        ("a.b=int:5000000000", 5000000000),
        ("a=float:0.5", 0.5),
        ("a=bool:true", True),
        ("a=str:x=y:z", "x=y:z"),
    ],
)
def test_override_kv(tmp_path: Path, model: Path, text: str, value: object) -> None:
    options = QuantizeOptions(override_kv=("a.b=int:1", text))
    quantize_gguf(model, tmp_path / "o.gguf", ["Q8_0"], options)
    assert open_gguf(tmp_path / "o.gguf")[text.partition("=")[0]] == value


@pytest.mark.parametrize("text", ["a", "a=int", "=int:3", "a=int:x", "a=bool:1", "a=uint:3"])
def test_bad_override_kv(text: str) -> None:
    with pytest.raises(ConfigError, match="a"):
        parse_override(text)


def test_not_a_model(tmp_path: Path) -> None:
    matrix = write_imatrix(tmp_path / "i.gguf", MODELS["odd"])
    with pytest.raises(ConfigError, match=r"no general\.architecture"):
        quantize_gguf(matrix, tmp_path / "o.gguf", ["Q8_0"])
    with pytest.raises(ConfigError, match="at least one"):
        quantize_gguf(matrix, tmp_path / "o.gguf", [])


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["quantize", *map(str, args)])
    if isinstance(result.exception, MconvError):
        return 2, str(result.exception)
    return result.exit_code, result.output


def test_command(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "o.gguf"
    code, text = run(model, out, "Q4_K_M,q8_0", "--tensor-type", "attn_v=q5_1", "--dry-run")
    assert code == 0
    assert "blk.0.attn_v.weight" in text and "--tensor-type" in text and "would write" in text
    assert leftovers(tmp_path) == {"in.gguf"}
    code, text = run(model, out, "Q4_K_M", "--json", "--threads", 2)
    found = json.loads(text)
    assert code == 0 and found["outputs"][0]["data_bytes"] < found["source_bytes"]
    assert len(found["outputs"][0]["tensors"]) == len(open_gguf(model).tensors)
    assert run(model, out, "Q8_0", "--force", "-q") == (0, "")
    kinds = tmp_path / "kinds.txt"
    kinds.write_text("attn_q=f16\nffn_up=bf16 ffn_down=f32")
    assert run(model, out, "Q8_0", "--force", "-q", "--tensor-type-file", kinds)[0] == 0
    made = tensors(out)
    assert [made[f"blk.2.{n}.weight"][0] for n in ("attn_q", "ffn_up", "ffn_down", "attn_k")] == [
        "F16", "BF16", "F32", "Q8_0"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["Q4_K_X"], "unknown quantization target 'Q4_K_X' .did you mean"),
        (["Q8_0", "--tensor-type", "a"], "REGEX=TYPE"),
        (["Q8_0", "--tensor-type", "attn_vv=q6_k"], "matches no tensor (did you mean 'attn_v'?)"),
        (["Q8_0", "--tensor-type", r"^blk\.\d+\.ffn_gat\.=q6_k"], "there are token_embd.weight, "),
        (["Q8_0", "--tensor-type", r"ffn_don\.weight=f16"], "did you mean 'ffn_down'"),
        (["Q8_0", "--report", "--dry-run"], "leave one of them out"),
        (["Q8_0", "--output-tensor-type", "q9"], "unknown tensor type 'q9'"),
        (["Q8_0", "--prune-layers", "a,b"], "not a list of layer numbers"),
        (["Q8_0", "--prune-layers", "80"], "cannot prune layer 80"),
        (["Q8_0", "--max-shard-size", "1KB", "--keep-split"], "exclude each other"),
    ],
)
def test_command_refuses(tmp_path: Path, model: Path, args: list[str], problem: str) -> None:
    code, text = run(model, tmp_path / "o.gguf", *args)
    assert code == 2
    assert problem.replace(".did", "(did") in " ".join(text.split())
    assert leftovers(tmp_path) == {"in.gguf"}


def test_every_target_decodes_close_to_the_source(tmp_path: Path) -> None:
    """Errors shrink with the bits, so no type is written with another one's bytes."""
    if not have_native():
        pytest.skip("too slow without native kernels")
    spec = MODELS["tied"]
    source = write_model(tmp_path / "in.gguf", spec)
    options = QuantizeOptions(imatrix=write_imatrix(tmp_path / "i.gguf", spec))
    names = [t for t in TARGETS if t != "COPY"]
    quantize_gguf(source, tmp_path / "{type}.gguf", names, options)
    truth = values(spec)
    errors = {t: error(open_gguf(tmp_path / f"{t}.gguf"), truth) for t in names}
    assert errors["F32"] == 0
    for better, worse in [
        ("F16", "BF16"), ("BF16", "Q8_0"), ("Q8_0", "Q6_K"), ("Q6_K", "Q5_K_M"),
        ("Q5_K_M", "Q4_K_M"), ("Q4_K_M", "Q3_K_M"), ("Q3_K_M", "Q2_K"), ("Q5_1", "Q4_1"),
        ("IQ4_XS", "IQ3_M"), ("IQ3_S", "IQ2_M"), ("IQ2_M", "IQ2_XXS"), ("IQ2_XXS", "IQ1_S"),
    ]:  # fmt: skip
        assert errors[better] < errors[worse], (better, worse)
    assert errors["IQ1_S"] < 1


def error(file: GgufFile, truth: dict[str, np.ndarray]) -> float:
    """Relative root mean square error over all matrices."""
    wrong = total = 0.0
    for name, x in truth.items():
        if x.ndim > 1:
            made = dequantize(file.raw(name), file.tensors[name].type, x.shape)
            wrong += float(((made - x.astype(np.float32)) ** 2).sum())
            total += float((x.astype(np.float32) ** 2).sum())
    return (wrong / total) ** 0.5


def test_best_has_less_error_and_reports_it(tmp_path: Path, model: Path) -> None:
    sums = {}
    for best in (False, True):
        out = tmp_path / f"{best}.gguf"
        options = QuantizeOptions(best=best, measure=True)
        (one,) = quantize_gguf(model, out, ["Q4_0"], options).outputs
        errors = {t.name: t.errors for t in one.tensors if t.errors is not None}
        assert {t.name for t in one.tensors if t.type.is_quantized} == set(errors)
        sums[best] = errors
    for name, plain in sums[False].items():
        assert plain.chosen == plain.default == pytest.approx(sums[True][name].default)
        assert sums[True][name].chosen < plain.chosen
    first, second = tensors(tmp_path / "False.gguf"), tensors(tmp_path / "True.gguf")
    assert {n: t for n, (t, _) in first.items()} == {n: t for n, (t, _) in second.items()}
    assert first != second


def test_command_reports_errors(tmp_path: Path, model: Path) -> None:
    code, text = run(model, tmp_path / "a.gguf", "Q4_K_M", "--best", "--report")
    assert code == 0, text
    name, kind, default, written = next(
        line.split() for line in text.splitlines() if line.startswith("  blk.0.attn_q.weight ")
    )
    assert kind == "Q5_0"  # its rows of 288 do not fill blocks of 256
    assert 0 < float(written) < float(default) < 0.2
    code, text = run(model, tmp_path / "b.gguf", "Q4_K_M", "--best", "--report", "--json")
    (found,) = [t for t in json.loads(text)["outputs"][0]["tensors"] if t["name"] == name]
    assert found["relative_rmse"] < found["relative_rmse_default"]
    assert found["relative_rmse"] == pytest.approx(float(written), abs=1e-5)


def test_errors_of_nothing_are_not_reported(tmp_path: Path, model: Path) -> None:
    code, text = run(model, tmp_path / "a.gguf", "Q4_0", "--report", "--dry-run")
    assert code == 2
    assert "leave one of them out" in text
