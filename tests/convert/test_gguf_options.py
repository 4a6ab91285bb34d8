"""Options of GGUF outputs: settings, splits, byte order, names, vocabulary alone, sizes to fix."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.gguf import KeyValue, ValueType, open_gguf
from mconv.convert.gguf.endian import swap_bytes
from mconv.convert.gguf.known_keys import misspelt
from mconv.convert.gguf.settings import apply_settings, parse_setting, plain, shown
from mconv.convert.gguf.values import f32, i32_array, string, strings, u32
from mconv.convert.quantize import QuantizeOptions, quantize_gguf
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError, UnsupportedError
from mconv.quant import type_by_name
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_archs

RECORDS = json.loads((Path(__file__).parent.parent / "fixtures" / "arch_digests.json").read_text())


def run(*args: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in args])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("options") / "Tiny-Mixtral-8x1M-Chat-v0.3"
    folder.mkdir()
    tiny_archs.write_recorded(RECORDS["mixtral"], folder, data_dir, "mixtral")
    return folder


KNOWN = {
    "a.count": u32("a.count", 3),
    "a.scale": f32("a.scale", 1.5),
    "a.name": string("a.name", "x"),
    "a.list": i32_array("a.list", [1, 2]),
    "a.words": strings("a.words", ["b"]),
}


@pytest.mark.parametrize(
    ("text", "kind", "value", "items"),
    [
        ("a.count=4", ValueType.U32, 4, None),
        ("a.scale=2", ValueType.F32, 2.0, None),
        ("a.name=7", ValueType.STRING, "7", None),
        ("a.name=a=b:c", ValueType.STRING, "a=b:c", None),
        ("a.list=3,4", ValueType.ARRAY, [3, 4], ValueType.I32),
        ("a.words=[\"x,y\", \"z\"]", ValueType.ARRAY, ["x,y", "z"], ValueType.STRING),
        ("a.count=i64:-4", ValueType.I64, -4, None),
        ("new=str:5", ValueType.STRING, "5", None),
        ("new=5", ValueType.U32, 5, None),
        ("new=-5", ValueType.I32, -5, None),
        ("new=5000000000", ValueType.U64, 5000000000, None),
        ("new=0.5", ValueType.F32, 0.5, None),
        ("new=true", ValueType.BOOL, True, None),
        ("new=http://x", ValueType.STRING, "http://x", None),
        ("new=qwen3:8b", ValueType.STRING, "qwen3:8b", None),
        ("new=str:f16: or f32", ValueType.STRING, "f16: or f32", None),
        ("new=f32[]:1,2.5", ValueType.ARRAY, [1.0, 2.5], ValueType.F32),
        ("new=[\"a\"]", ValueType.ARRAY, ["a"], ValueType.STRING),
        ("new=[1.5, 2]", ValueType.ARRAY, [1.5, 2.0], ValueType.F32),
    ],
)  # fmt: skip
def test_settings_take_types(
    text: str, kind: ValueType, value: Any, items: ValueType | None
) -> None:
    entry = parse_setting(text, KNOWN)
    assert (entry.type, entry.items) == (kind, items)
    assert plain(entry) == value


@pytest.mark.parametrize(
    "text",
    ["a.count", "=3", "a.count=x", "a.count=-1", "a.scale=big", "new=bool:3", "new=u8:256",
     "a.list=[1", "a.list=1,x", "new=@/no/such/file"],
)  # fmt: skip
def test_bad_settings(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_setting(text, KNOWN)


@pytest.mark.parametrize("text", ["u33:5", "int:5", "u32s[]:1,2", "uint8[]:1", "bf16:2"])
def test_unknown_types_are_no_texts(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no type '.*'; types are u8, i8, .*, str"):
        parse_setting(f"new={text}", KNOWN)


def test_misspelt_keys_are_told() -> None:
    before = [string("general.architecture", "llama"), string("general.mine", "x")]
    good = ["general.url=x", "general.base_model.3.name=x", "general.mine=y", "my.own=1"]
    good += ["llama.context_length=8", "llama.something.of.mine=8", "tokenizer.ggml.pre=x"]
    assert misspelt(good, before) == ()
    texts = ["general.nane=x", "llama.context_lenght=9", "tokenizer.ggml.prr=x", "general.zzz=1"]
    found = misspelt(texts, before)
    assert [note.partition(" ")[0] for note in found] == [t.partition("=")[0] for t in texts]
    hints = ("'general.name'", "'llama.context_length'", "'tokenizer.ggml.pre'", "GGUF defines")
    assert all(hint in note for hint, note in zip(hints, found, strict=True))


def test_settings_keep_their_place_and_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ é }}\n", encoding="utf-8")
    texts = ["a.scale=9", f"tokenizer.chat_template=@{tmp_path / 't.jinja'}"]
    found = apply_settings(KNOWN.values(), texts)
    assert [e.key for e in found] == [*KNOWN, "tokenizer.chat_template"]
    assert found[1].value == 9.0 and found[-1].value == "{{ é }}\n"
    assert shown(found[-1]) == "{{ é }}\\n" and "2 of i32" in shown(KNOWN["a.list"])


def test_splits_by_number_of_tensors(tmp_path: Path, model: Path) -> None:
    done = run("to-gguf", model, tmp_path / "x.gguf", "--max-shard-tensors", 7)
    assert done.exit_code == 0, done.output
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"x-0000{n}-of-00004.gguf" for n in range(1, 5)]
    counts = [len(open_gguf(tmp_path / n, follow_splits=False).tensors) for n in names]
    assert counts == [7, 7, 7, sum(counts) - 21]
    done = run(
        "quantize", tmp_path / names[0], tmp_path / "q.gguf", "Q8_0", "--max-shard-tensors", 20,
        "--set", "general.author=me",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert open_gguf(tmp_path / "q-00001-of-00002.gguf")["general.author"] == "me"


def test_metadata_file_and_settings(tmp_path: Path, model: Path) -> None:
    meta = tmp_path / "m.json"
    meta.write_text(json.dumps({"general.author": "me", "general.tags": ["a", "b"]}))
    out = tmp_path / "x.gguf"
    done = run("to-gguf", model, out, "--metadata", meta, "--set", "general.name=New")
    assert done.exit_code == 0, done.output
    file = open_gguf(out)
    assert (file["general.author"], file["general.name"]) == ("me", "New")
    assert list(file["general.tags"]) == ["a", "b"]
    done = run("to-gguf", model, tmp_path / "y.gguf", "--set", "general.nane=New")
    assert done.exit_code == 0 and "did you mean 'general.name'" in done.output
    for command in (["gguf", "set", out], ["quantize", out, tmp_path / "q.gguf", "Q8_0", "--set"]):
        done = run(*command, "general.nane=New", "--dry-run")
        assert done.exit_code == 0 and "did you mean 'general.name'" in done.output
    meta.write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        to_gguf(model, tmp_path / "y.gguf", metadata=meta)


def test_names_in_a_folder(tmp_path: Path, model: Path) -> None:
    report = to_gguf(model, tmp_path, "bf16,q8_0")
    names = [one.target.name for one in (report, *report.more)]
    assert names == [
        "Tiny-Mixtral-8x1M-Chat-v0.3-BF16.gguf",
        "Tiny-Mixtral-8x1M-Chat-v0.3-Q8_0.gguf",
    ]
    assert all((tmp_path / name).is_file() for name in names)


def test_vocabulary_alone(tmp_path: Path, model: Path) -> None:
    to_gguf(model, tmp_path / "whole.gguf", "f16")
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    done = run("to-gguf", bare, tmp_path / "v.gguf", "--vocab-only", "--name", "N", "--json")
    assert done.exit_code == 0, done.output
    whole, vocab = open_gguf(tmp_path / "whole.gguf"), open_gguf(tmp_path / "v.gguf")
    assert not vocab.tensors and vocab["general.name"] == "N"
    kept = [k for k in whole.entries if k.startswith(("tokenizer.", "llama."))]
    assert [k for k in vocab.entries if k.startswith(("tokenizer.", "llama."))] == kept
    for key in kept:
        assert plain(whole.entries[key]) == plain(vocab.entries[key])


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_big_endian_is_read_by_the_gguf_package(tmp_path: Path, model: Path, kind: str) -> None:
    small, big = tmp_path / "s.gguf", tmp_path / "b.gguf"
    to_gguf(model, small, kind)
    to_gguf(model, big, kind, quantization=QuantizeOptions(big_endian=True))
    ours, theirs = open_gguf(small), gguf.GGUFReader(big)
    assert theirs.endianess == gguf.GGUFEndian.BIG
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    field = theirs.fields["llama.embedding_length"]
    assert field.contents() == ours["llama.embedding_length"]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        raw = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)
        if tensor.tensor_type.name in ("F32", "F16"):  # the package turns plain types by itself
            assert np.array_equal(tensor.data, ours.array(tensor.name))
        else:
            assert np.array_equal(swap_bytes(raw, info.type), ours.raw(tensor.name))
    assert open_gguf(big).big_endian


def test_types_without_a_byte_order(tmp_path: Path, model: Path) -> None:
    to_gguf(model, tmp_path / "a.gguf", "f32")
    with pytest.raises(UnsupportedError, match="Q5_0, which cannot be written big-endian"):
        quantize_gguf(
            tmp_path / "a.gguf", tmp_path / "b.gguf", ["Q5_0"], QuantizeOptions(big_endian=True)
        )
    data = np.arange(2 * 210, dtype=np.uint8) % 251
    turned = swap_bytes(data, type_by_name("Q6_K"))
    assert np.flatnonzero(turned != data).tolist() == [208, 209, 418, 419]
    assert np.array_equal(swap_bytes(turned, type_by_name("Q6_K")), data)


def test_projectors_are_out_of_scope(tmp_path: Path, model: Path) -> None:
    done = run("to-gguf", model, tmp_path / "x.gguf", "--mmproj")
    assert isinstance(done.exception, UnsupportedError) and "out of scope" in str(done.exception)


def resized(folder: Path, model: Path, rows: int, added: int = 0) -> int:
    """Copy the model with another number of embedding rows and more tokens; return its own size."""
    weights = load_file(model / "model.safetensors")
    size = len(weights["model.embed_tokens.weight"])
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = weights[name]
        more = np.ones((max(0, rows), table.shape[1]), table.dtype)
        weights[name] = np.concatenate([table, more])[: size + rows]
    save_file(weights, folder / "model.safetensors")
    document = json.loads((folder / "tokenizer.json").read_text())
    for n in range(added):
        document["added_tokens"].append(
            {"id": size + n, "content": f"<new{n}>", "special": False, "normalized": False}
        )
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return size


@pytest.mark.parametrize(
    ("rows", "added", "fix", "change"),
    [(5, 0, "pad", 5), (5, 0, "trim", 0), (0, 3, "pad", 3), (0, 3, "trim", 0), (-4, 0, "pad", 0),
     (-4, 0, "trim", -4), (2, 100, "pad", 100), (0, 0, "pad", 0)],
)  # fmt: skip
def test_sizes_that_differ(
    tmp_path: Path, model: Path, rows: int, added: int, fix: str, change: int
) -> None:
    size = resized(tmp_path / "m", model, rows, added)
    if rows or added:
        with pytest.raises(ConfigError, match="--vocab-fix"):
            to_gguf(tmp_path / "m", tmp_path / "x.gguf", "bf16")
    report = to_gguf(tmp_path / "m", tmp_path / "x.gguf", "bf16", vocab_fix=fix)
    file = open_gguf(tmp_path / "x.gguf")
    want = size + change
    assert file.tensors["token_embd.weight"].shape[0] == want
    assert file.tensors["output.weight"].shape[0] == want
    assert len(file["tokenizer.ggml.tokens"]) == want == file["llama.vocab_size"]
    assert any("--vocab-fix" in w for w in report.warnings) == bool(rows or added)
    before = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    table = file.array("token_embd.weight")
    same = min(size, want, size + rows)
    assert np.array_equal(table[:same].astype(np.float32), before[:same].astype(np.float32))
    assert not table[max(size, size + rows) :].any()
    if added and fix == "pad":
        assert file["tokenizer.ggml.tokens"][size] == "<new0>"


def test_entries_are_values() -> None:
    assert plain(KeyValue("a", ValueType.ARRAY, np.array([True]), ValueType.BOOL)) == [True]
