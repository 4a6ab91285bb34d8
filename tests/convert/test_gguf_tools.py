"""The GGUF tools: editing in place and undoing it, merging, splitting, hashing, showing."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.gguf import inplace, open_gguf
from mconv.convert.gguf_tools import (
    check_manifest,
    hashes,
    merge,
    repair_file,
    set_metadata,
    split,
)
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError, FormatError, OutputError

sys.path.insert(0, str(Path(__file__).parent))
import tiny_archs

RECORDS = json.loads((Path(__file__).parent.parent / "fixtures" / "arch_digests.json").read_text())


def run(*args: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in args])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    tiny_archs.write_recorded(RECORDS["gpt2"], folder, data_dir, "gpt2")
    to_gguf(folder, folder / "m.gguf", "q8_0", name="Model of some length")
    return folder / "m.gguf"


@pytest.fixture
def model(tmp_path: Path, source: Path) -> Path:
    (tmp_path / "m.gguf").write_bytes(source.read_bytes())
    return tmp_path / "m.gguf"


def test_same_length_is_in_place(model: Path) -> None:
    before, inode = model.read_bytes(), model.stat().st_ino
    report = set_metadata(model, ["general.name=Other of same lengt", "gpt2.context_length=64"])
    assert report.in_place and [key for key, _, _ in report.changes] == [
        "general.name", "gpt2.context_length",
    ]  # fmt: skip
    after = model.read_bytes()
    assert len(after) == len(before) and model.stat().st_ino == inode
    start = inplace.data_start(open_gguf(model))
    assert after[start:] == before[start:] and after[:start] != before[:start]
    reader = gguf.GGUFReader(model)
    assert reader.fields["gpt2.context_length"].contents() == 64
    assert not inplace.undo_path(model).exists()
    assert set_metadata(model, ["gpt2.context_length=64"]).changes == ()


def test_another_length_replaces_the_file(model: Path) -> None:
    old = open_gguf(model)
    raw = {name: bytes(old.raw(name)) for name in old.tensors}
    report = set_metadata(
        model, ["general.description=" + "x" * 100, "my.list=i32[]:1,2"], delete=["general.name"]
    )
    assert not report.in_place
    new = open_gguf(model)
    assert "general.name" not in new and new["my.list"].tolist() == [1, 2]
    assert {name: bytes(new.raw(name)) for name in new.tensors} == raw
    assert sorted(p.name for p in model.parent.iterdir()) == ["m.gguf"]


def test_a_small_change_may_use_the_padding(model: Path) -> None:
    start = inplace.data_start(open_gguf(model))
    sizes = set()
    for length in range(1, 33):
        report = set_metadata(model, [f"general.name={'y' * length}"], dry_run=True)
        sizes.add(report.in_place)
    assert sizes == {True, False} and inplace.data_start(open_gguf(model)) == start


def test_another_file(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    set_metadata(model, ["general.name=a"], out=tmp_path / "n.gguf")
    assert model.read_bytes() == before and open_gguf(tmp_path / "n.gguf")["general.name"] == "a"
    with pytest.raises(OutputError, match="--force"):
        set_metadata(model, ["general.name=b"], out=tmp_path / "n.gguf")


SAME = "general.name=Other of same lengt"


def test_a_torn_edit_is_undone(model: Path) -> None:
    before = model.read_bytes()
    new = inplace.new_header(open_gguf(model), list(open_gguf(model).entries.values()))
    changed = bytearray(before)
    changed[100:200] = b"z" * 100
    head = inplace._HEAD.pack(
        len(before), len(new), inplace._digest(before[: len(new)]), inplace._digest(b"new")
    )
    inplace._save(inplace.undo_path(model), inplace._MAGIC + head + before[: len(new)])
    model.write_bytes(changed)
    with pytest.raises(OutputError, match="mconv gguf repair"):
        set_metadata(model, [SAME])
    done = run("gguf", "repair", model)
    assert done.exit_code == 0 and "undone" in done.output
    assert model.read_bytes() == before and not inplace.undo_path(model).exists()
    assert "nothing to repair" in run("gguf", "repair", model).output


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_every_interruption_can_be_repaired(
    model: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    before, calls = model.read_bytes(), 0
    real = inplace.os.fsync

    def failing(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(5, "interrupted")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(inplace.os, "fsync", failing)
        with pytest.raises(OutputError, match="interrupted"):
            set_metadata(model, [SAME])
    repair_file(model)
    after = model.read_bytes()
    assert not inplace.undo_path(model).exists()
    if after != before:
        assert open_gguf(model)["general.name"] == "Other of same lengt"
        assert fail_at >= 3, "the file is touched only after the old header is safe"
    assert open_gguf(model).tensors.keys()


@pytest.mark.parametrize("cut", [0, 5, 40, 200])
def test_an_incomplete_copy_means_an_untouched_file(model: Path, cut: int) -> None:
    before = model.read_bytes()
    head = inplace._HEAD.pack(len(before), 4096, inplace._digest(before[:4096]), b"x" * 32)
    inplace.undo_path(model).write_bytes((inplace._MAGIC + head + before[:4096])[:cut])
    assert "had not begun" in repair_file(model)
    assert model.read_bytes() == before


def test_a_copy_of_another_file_is_refused(model: Path) -> None:
    head = inplace._HEAD.pack(7, 4, inplace._digest(b"abcd"), b"x" * 32)
    inplace.undo_path(model).write_bytes(inplace._MAGIC + head + b"abcd")
    with pytest.raises(FormatError, match="was replaced since"):
        repair_file(model)


@pytest.mark.parametrize(
    ("settings", "delete", "text"),
    [
        (["general.name"], [], "KEY=VALUE"),
        (["gpt2.context_length=x"], [], "u32"),
        ([], ["general.nam"], "did you mean 'general.name'"),
        (["general.alignment=64"], [], "layout depends"),
        (["split.count=3"], [], "layout depends"),
    ],
)
def test_refused_settings(model: Path, settings: list[str], delete: list[str], text: str) -> None:
    before = model.read_bytes()
    with pytest.raises(ConfigError, match=text):
        set_metadata(model, settings, delete=delete)
    assert model.read_bytes() == before


def test_split_and_merge_give_the_file_again(model: Path, tmp_path: Path) -> None:
    report = split(model, tmp_path / "s.gguf", max_tensors=10)
    assert len(report.files) == -(-len(open_gguf(model).tensors) // 10)
    merge(min(report.files), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == model.read_bytes()
    again = split(min(report.files), tmp_path / "t.gguf", max_size=60_000, empty_first=True)
    first, *rest = sorted(again.files)
    assert not open_gguf(first, follow_splits=False).tensors
    for path in rest:
        assert "general.name" not in open_gguf(path, follow_splits=False)
    merge(rest[-1], tmp_path / "again.gguf", force=True)
    assert (tmp_path / "again.gguf").read_bytes() == model.read_bytes()
    set_metadata(first, ["general.name=n"])
    assert open_gguf(rest[0])["general.name"] == "n"


def test_refused_splits(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size"):
        split(model, tmp_path / "s.gguf")
    with pytest.raises(ConfigError, match="nothing to split"):
        split(model, tmp_path / "s.gguf", max_tensors=1000)
    with pytest.raises(ConfigError, match="not split"):
        merge(model, tmp_path / "s.gguf")


def test_hashes(model: Path, tmp_path: Path) -> None:
    file = open_gguf(model)
    found = {(a, n): d for a, d, n in hashes(model, ("sha256", "sha1", "uuid"))}
    whole = hashlib.sha256()
    for name in file.tensors:
        raw = bytes(file.raw(name))
        whole.update(raw)
        assert found["sha256", name] == hashlib.sha256(raw).hexdigest()
        assert found["sha1", name] == hashlib.sha1(raw).hexdigest()
    assert found["sha256", ""] == whole.hexdigest()
    assert len(found) == 2 * len(file.tensors) + 3
    set_metadata(model, ["general.name=another"])
    parts = split(model, tmp_path / "s.gguf", max_tensors=10)
    assert {(a, n): d for a, d, n in hashes(min(parts.files), ("sha256", "sha1", "uuid"))} == found


def test_hashes_are_those_of_the_gguf_package(model: Path, capsys: Any) -> None:
    from gguf.scripts.gguf_hash import gguf_hash

    gguf_hash(gguf.GGUFReader(model, "r"), "m.gguf", True, False)
    theirs = sorted(line.split() for line in capsys.readouterr().out.splitlines())
    ours = run("gguf", "hash", model, "--algorithm", "sha256", "--algorithm", "sha1",
               "--algorithm", "uuid").output  # fmt: skip
    mine = [line.replace(str(model), "m.gguf").split() for line in ours.splitlines()]
    assert sorted(mine) == theirs


def test_manifest(model: Path, tmp_path: Path) -> None:
    listing = tmp_path / "hashes.txt"
    listing.write_text(run("gguf", "hash", model).output)
    assert check_manifest(model, listing) == ([], [])
    assert run("gguf", "hash", model, "--check", listing).exit_code == 0
    raw = bytearray(model.read_bytes())
    raw[open_gguf(model).tensors["blk.0.ffn_up.weight"].offset] ^= 1
    model.write_bytes(raw)
    wrong, _ = check_manifest(model, listing)
    assert len(wrong) == 2, "the tensor, and all together"
    assert run("gguf", "hash", model, "--check", listing).exit_code == 1
    listing.write_text("no hashes")
    for no_list in (listing, model):
        with pytest.raises(ConfigError, match="no line such as"):
            check_manifest(model, no_list)


def test_commands(model: Path, tmp_path: Path) -> None:
    shown = run("gguf", "show", model)
    assert shown.exit_code == 0 and "general.name" in shown.output and "blk.0" in shown.output
    listing = json.loads(run("gguf", "show", model, "--json").output)
    assert listing["metadata"]["gpt2.block_count"] == {"type": "u32", "value": 2}
    assert len(listing["tensors"]) == len(open_gguf(model).tensors)
    assert run("gguf", "show", model, "--key", "general.name").output == "Model of some length\n"
    dry = run("gguf", "set", model, "general.name=x", "--dry-run")
    assert "would change" in dry.output and open_gguf(model)["general.name"] != "x"
    done = run("gguf", "set", model, "general.name=x")
    assert done.exit_code == 0 and "a new file" in done.output
    assert "nothing changes" in run("gguf", "set", model, "general.name=x").output
    done = run("gguf", "split", model, tmp_path / "s.gguf", "--max-shard-tensors", 9, "--json")
    files = list(json.loads(done.output)["files"])
    done = run("gguf", "merge", files[-1], tmp_path / "w.gguf")
    assert done.exit_code == 0 and np.array_equal(
        np.fromfile(tmp_path / "w.gguf", np.uint8), np.fromfile(model, np.uint8)
    )
    assert json.loads(run("gguf", "hash", model, "--no-layer", "--json").output)["hashes"]
