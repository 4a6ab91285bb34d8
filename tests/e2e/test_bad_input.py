"""Damaged checkpoints through the command line: one clear error that names the culprit, exit code
2, nothing written; or, where a file does not matter for the weights, the very same result.

The damages are those of real life: lost, cut, empty, exchanged files, mixed saves, wrong nodes.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import assert_refused, copy, mconv, process, tree


@dataclass(frozen=True)
class Base:
    """A pristine checkpoint.

    Attributes:
        path: below the fixtures.
        holds: pattern of the files without which there are no weights.
        options: of the command; ``@`` is the folder above the checkpoint.
    """

    path: str
    holds: str
    options: tuple[str, ...] = ()


VOCAB = ("--vocab-size", "317")
BASES = {
    "hf": Base("torch/hf_safetensors_sharded/ckpt", "*.safetensors"),
    "hf-bin": Base("torch/hf_bin_sharded/ckpt", "*.bin"),
    "torch-save": Base("torch/ddp_torchsave_2r/ckpt", "*.pt"),
    "torch-legacy": Base("torch/legacy_torchsave/ckpt", "*.pth"),
    "dcp": Base("torch/dcp_fsdp2_2r/ckpt", "*.distcp"),
    "dcp-mesh": Base("torch/dcp_fsdp2_tp_2x2/ckpt", "*.distcp"),
    "dcp-hf": Base("torch/dcp_hf_sharded_3r/ckpt", "*.safetensors", ("--config", "@")),
    "ranks-dtensor": Base("torch/dtensor_ranksave_2x2/ckpt", "*model*rank*"),
    "ranks-fsdp1": Base("torch/fsdp1_sharded_ranksave_2r/ckpt", "*rank*"),
    "zero0": Base("deepspeed/z0_dp2_bf16/ckpt", "*/*model_states.pt"),
    "zero1": Base("deepspeed/z1_dp2_bf16/ckpt", "*/*_states.pt"),
    "zero2": Base("deepspeed/z2_dp4_bf16_tied/ckpt", "*/*_states.pt"),
    "zero3": Base("deepspeed/z3_dp3_bf16_odd_subgroups/ckpt", "*/*optim_states.pt"),
    "universal": Base("deepspeed/z3_dp2_bf16/universal", "*/zero/*/fp32.pt"),
    "megatron": Base("megatron/llama_tp2pp2/torch", "*/*/*.pt", VOCAB),
    "megatron-legacy": Base("megatron/llama_legacy_tp2pp2/torch", "*/*/*.pt", VOCAB),
    "megatron-dist": Base("megatron/qwen2_bias_tp2/torch_dist", "*/*.distcp", VOCAB),
    "megatron-zarr": Base("megatron/zarr_llama_tp2pp2/zarr", "*/*layers*/0.0.0", VOCAB),
    "megatron-dcp": Base("megatron/fsdp2_dp2_torchdcp/torch_dcp", "*/*.distcp", VOCAB),
}
#: Bases of which any one weights file may be lost: the bytes are in others too.
SPARE = {"zero0", "zero1"}
#: Bases whose files all say what they hold, whatever their names.
SELF_DESCRIBING = {"dcp-hf"}


@dataclass
class Good:
    """What the pristine checkpoints become."""

    fixtures: Path
    folder: Path

    def options(self, name: str) -> list[str]:
        """Return the options for a checkpoint, whole or damaged."""
        base = BASES[name]
        return [str((self.fixtures / base.path).parent) if o == "@" else o for o in base.options]

    def weights(self, name: str) -> bytes:
        """Return the bytes of the merged weights."""
        out = self.folder / name
        if not out.exists():
            done = mconv("reshard", self.fixtures / BASES[name].path, out, *self.options(name))
            assert done.code == 0, done.err
        return weights(out)


@pytest.fixture(scope="module")
def good(fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Good:
    """What each pristine checkpoint becomes."""
    return Good(fixtures_dir, tmp_path_factory.mktemp("good"))


def weights(folder: Path) -> bytes:
    """Return the bytes of all weights of a written folder."""
    return b"".join(p.read_bytes() for p in sorted(folder.glob("model*.safetensors")))


def victims(folder: Path, base: Base) -> list[Path]:
    """Return a few of the files that hold weights: first, last, one in the middle."""
    found = sorted(folder.glob(base.holds))
    assert found
    return sorted({found[0], found[len(found) // 2], found[-1]})


def cut_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("moved"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><title>404</title></html>\n")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


DAMAGES = (
    Path.unlink, cut_byte, half, empty, zeros, folder_instead, circle, dangling, pipe, web_page,
    pointer,
)  # fmt: skip


def check(name: str, source: Path, work: Path, good: Good, *, must: bool = True) -> str:
    """Reshard a damaged checkpoint: refused, or (unless ``must``) the same as the pristine one."""
    work.mkdir(exist_ok=True)
    out = work / "hf"
    done = mconv("reshard", source, out, *good.options(name))
    if done.code == 0 and not must:
        assert weights(out) == good.weights(name)
        shutil.rmtree(work)
        return done.err
    return assert_refused(done, work)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BASES)
def test_damaged_file(
    fixtures_dir: Path, tmp_path: Path, good: Good, name: str, damage: Callable[[Path], None]
) -> None:
    if (name, damage) == ("megatron-zarr", zeros):
        pytest.skip("zeros are numbers like any others")
    base = BASES[name]
    for k, victim in enumerate(victims(fixtures_dir / base.path, base)):
        folder = copy(fixtures_dir / base.path, tmp_path / f"{k}" / "ckpt")
        path = folder / victim.relative_to(fixtures_dir / base.path)
        damage(path)
        said = check(name, folder, tmp_path / "out", good, must=name not in SPARE)
        parts = (path.name, path.parent.name, *re.findall(r"(?:rank|part|shard)\D{0,3}\d+", said))
        assert not said or any(part in said for part in parts), said


@pytest.mark.parametrize("damage", [Path.unlink, cut_byte, empty], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BASES)
def test_any_other_file(
    fixtures_dir: Path, tmp_path: Path, good: Good, name: str, damage: Callable[[Path], None]
) -> None:
    """Metadata, optimizer files, trackers: refused, or without effect on the weights."""
    base = BASES[name]
    source = fixtures_dir / base.path
    held = set(source.glob(base.holds))
    others = [p for p in sorted(source.rglob("*")) if p.is_file() and p not in held][:6]
    for k, victim in enumerate(others):
        folder = copy(source, tmp_path / f"{k}" / "ckpt")
        damage(folder / victim.relative_to(source))
        check(name, folder, tmp_path / "out", good, must=False)


SWAPPED = [n for n in BASES if n not in ("torch-save", "torch-legacy", "universal")]


@pytest.mark.parametrize("name", SWAPPED)
def test_exchanged_files(fixtures_dir: Path, tmp_path: Path, good: Good, name: str) -> None:
    base = BASES[name]
    folder = copy(fixtures_dir / base.path, tmp_path / "ckpt")
    found = sorted(folder.glob(base.holds))
    if len(found) < 2 or {p.name for p in found} == {"0.0.0"}:
        pytest.skip("no two files of one kind, or nothing in them says whose they are")
    first, second = found[0], found[-1]
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    check(name, folder, tmp_path / "out", good, must=name not in SPARE | SELF_DESCRIBING)


MIXED = {
    "zero1": (rb"(global_steps(?:q.|r....))K\x03", b"K\x04", "*/*rank_1*optim*"),
    "zero3": (rb"(global_steps(?:q.|r....))K\x03", b"K\x04", "*/*rank_1*model*"),
    "megatron": (rb"(iteration(?:q.|r....))K\n", b"K\x0b", "*/mp_rank_01_001/*.pt"),
}


@pytest.mark.parametrize("name", MIXED)
def test_files_of_two_steps(fixtures_dir: Path, tmp_path: Path, good: Good, name: str) -> None:
    old, new, pattern = MIXED[name]
    folder = copy(fixtures_dir / BASES[name].path, tmp_path / "ckpt")
    path = next(iter(folder.glob(pattern)))
    with zipfile.ZipFile(path) as archive:
        entries = [(i.filename, archive.read(i)) for i in archive.infolist()]
    changed = 0
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            if data == struct.pack("<f", 3):  # the optimizer's own counter
                data, changed = struct.pack("<f", 4), changed + 1
            data, n = re.subn(old, lambda m: m[1] + new, data, flags=re.DOTALL)
            changed += n
            archive.writestr(entry, data)
    assert changed
    said = check(name, folder, tmp_path / "out", good)
    assert path.name in said or path.parent.name in said


@pytest.mark.parametrize(
    ("name", "tracker"),
    [("megatron", "latest_checkpointed_iteration.txt"), ("zero3", "latest")],
)
def test_lost_save_is_not_replaced_by_another(
    fixtures_dir: Path, tmp_path: Path, name: str, tracker: str
) -> None:
    """The folder of a save that was never finished must not become the save before it."""
    folder = copy(fixtures_dir / BASES[name].path, tmp_path / "ckpt")
    (done,) = (p for p in folder.iterdir() if p.is_dir())
    lost = done.with_name(done.name[:-1] + "9")
    lost.mkdir()
    (tmp_path / "out").mkdir()
    said = assert_refused(mconv("reshard", lost, tmp_path / "out" / "hf", *VOCAB), tmp_path / "out")
    assert str(lost) in said
    (folder / tracker).write_text(lost.name if name == "zero3" else lost.name.split("_")[1])
    whole = mconv("reshard", folder, tmp_path / "out" / "hf", *VOCAB)
    assert whole.code == 0
    assert f"{lost.name}, which is not there" in whole.err
    assert "older save" in whole.err


def test_stale_shard_is_reported(fixtures_dir: Path, tmp_path: Path, good: Good) -> None:
    folder = copy(fixtures_dir / BASES["hf"].path, tmp_path / "ckpt")
    first = min(folder.glob("*.safetensors"))
    stale = first.with_name("model-00001-of-00002.safetensors")
    shutil.copy(first, stale)
    done = mconv("reshard", folder, tmp_path / "hf")
    assert done.code == 0
    assert stale.name in done.err
    assert weights(tmp_path / "hf") == good.weights("hf")
    (folder / "model.safetensors.index.json").unlink()  # now nothing says which one is right
    (tmp_path / "out").mkdir()
    assert_refused(mconv("reshard", folder, tmp_path / "out" / "hf"), tmp_path / "out")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's right to read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["hf", "hf-bin", "dcp", "zero3", "megatron", "megatron-zarr"])
def test_unreadable_file(fixtures_dir: Path, tmp_path: Path, name: str) -> None:
    base = BASES[name]
    folder = copy(fixtures_dir / base.path, tmp_path / "ckpt")
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o055)
    for path in tmp_path.parents:
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    mconv("reshard", folder, tmp_path / "first", *base.options)  # imports all that is needed
    victim = victims(folder, base)[0]
    victim.chmod(0)
    with as_nobody():
        done = mconv("reshard", folder, tmp_path / "out" / "hf", *base.options)
    assert victim.name in assert_refused(done, tmp_path / "out")


def test_a_folder_that_may_not_be_written(fixtures_dir: Path, tmp_path: Path) -> None:
    source = fixtures_dir / BASES["hf"].path
    out = tmp_path / "a" / "b"
    (tmp_path / "a").write_text("a file, not a folder")
    said = assert_refused(mconv("reshard", source, out), out)
    assert str(tmp_path / "a") in said


def test_the_source_is_never_replaced(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = copy(fixtures_dir / BASES["hf"].path, tmp_path / "run" / "ckpt")
    before = tree(tmp_path)
    for target in (folder, tmp_path / "run"):
        done = mconv("reshard", folder, target, "--force")
        assert done.code == 2
        assert "holds the source" in done.err
        assert tree(tmp_path) == before


def test_the_contract_holds_in_a_process_of_its_own(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = copy(fixtures_dir / BASES["megatron"].path, tmp_path / "ckpt")
    victim = sorted(folder.glob("*/*/*.pt"))[2]
    cut_byte(victim)
    (tmp_path / "out").mkdir()
    said = assert_refused(
        process("reshard", folder, tmp_path / "out" / "hf", *VOCAB), tmp_path / "out"
    )
    assert victim.parent.name in said
    said = assert_refused(
        process("to-gguf", folder, tmp_path / "out" / "m.gguf", *VOCAB), tmp_path / "out"
    )
    assert victim.parent.name in said
    assert process("inspect", folder).code == 2
