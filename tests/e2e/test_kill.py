"""``kill -9`` at any moment, a full disk, a resume: nothing that looks finished is ever left, and
what is finished later has the bytes of an undisturbed run.
"""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import TRAINED, command, process, tree
from synthetic import llama

SEEDS = range(5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 200 MB."""
    folder = tmp_path_factory.mktemp("source") / "model"
    assert llama(folder, layers=3) > 150e6
    return folder


def arguments(job: str, source: Path, out: Path) -> list[object]:
    """Return the command line of a job, and make it slow enough to be hit (one thread)."""
    options = ["--threads", 1, "--max-memory", "1MiB", "-q"]
    if job == "to-gguf":
        return [job, source, out / "m.gguf", "--type", "q8_0", "--tokenizer", TRAINED / "hf",
                *options]  # fmt: skip
    return [job, source, out / "hf", "--max-shard-size", "20MB", *options]


@pytest.fixture(scope="module", params=["reshard", "to-gguf"])
def undisturbed(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, float]:
    """A job, its result, and the seconds it took."""
    out = tmp_path_factory.mktemp("good")
    started = time.monotonic()
    done = process(*arguments(request.param, source, out))
    assert done.code == 0, done.err
    return request.param, out, time.monotonic() - started


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {n: (folder / n).read_bytes() for n in tree(folder) if (folder / n).is_file()}


@pytest.mark.parametrize("seed", SEEDS)
def test_kill_and_resume(
    source: Path, tmp_path: Path, undisturbed: tuple[str, Path, float], seed: int
) -> None:
    job, good, seconds = undisturbed
    # somewhere in the run; the last seed aims at its end, where files are renamed
    share = 0.93 if seed == 4 else random.Random(seed).uniform(0.2, 0.9)
    running = subprocess.Popen(command(*arguments(job, source, tmp_path)))
    time.sleep(seconds * share)
    running.send_signal(signal.SIGKILL)
    killed = running.wait() == -signal.SIGKILL
    visible = [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    if visible or not killed:  # then it must be whole
        assert content(tmp_path) == content(good)
        return
    again = process(*arguments(job, source, tmp_path), "--resume")
    assert again.code == 0, again.err
    assert content(tmp_path) == content(good)  # and no hidden folder or lock is left


def test_a_resume_of_other_options_is_refused(source: Path, tmp_path: Path) -> None:
    running = subprocess.Popen(command(*arguments("reshard", source, tmp_path)))
    hidden = tmp_path / ".hf.mconv-part"
    while running.poll() is None and not any(hidden.glob("model*")):
        time.sleep(0.002)
    running.kill()
    running.wait()
    before = tree(tmp_path)
    assert hidden.name in before
    refused = process(*arguments("reshard", source, tmp_path), "--dtype", "bf16", "--resume")
    assert refused.code == 2
    assert "other sources or options" in refused.err
    assert set(tree(tmp_path)) <= set(before)
    anew = process(*arguments("reshard", source, tmp_path))  # without --resume: starts over
    assert anew.code == 0, anew.err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def limited(nbytes: int) -> Callable[[], None]:
    """Return what limits the size of files in a child process; more fails with EFBIG."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    return limit


@pytest.mark.parametrize("job", ["reshard", "to-gguf"])
def test_files_that_may_not_grow(source: Path, tmp_path: Path, job: str) -> None:
    arguments_ = arguments(job, source, tmp_path)
    failed = process(*arguments_, preexec_fn=limited(10 << 20))
    assert failed.code == 2, failed
    assert failed.err.startswith("error: ")
    assert len(failed.err.splitlines()) == 1
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    again = process(*arguments_, "--resume")
    assert again.code == 0, again.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB, where mounting is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    try:
        made = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        made = False
    if not made:
        pytest.skip("mounting a small disk is not allowed")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=False)


@pytest.mark.parametrize("job", ["reshard", "to-gguf"])
def test_too_small_disk_is_said_before_writing(source: Path, small_disk: Path, job: str) -> None:
    filler = small_disk / "filler"
    if job == "to-gguf":
        filler.write_bytes(bytes(40 << 20))
    done = process(*arguments(job, source, small_disk))
    assert done.code == 2
    assert "free on that disk" in done.err
    assert tree(small_disk) in ([], ["filler"])


@pytest.mark.parametrize("job", ["reshard", "to-gguf"])
def test_disk_that_fills_up_while_writing(small_disk: Path, job: str) -> None:
    """Another process takes the space that was free when the run began."""
    half = small_disk.parent / "half"
    llama(half, layers=1, ffn=2048)
    running = subprocess.Popen(
        command(*arguments(job, half, small_disk)), stderr=subprocess.PIPE, text=True
    )
    while running.poll() is None and not any(small_disk.glob(".*part/*")):
        time.sleep(0.001)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
    _, said = running.communicate()
    if running.returncode == 0:
        pytest.skip("the run was faster")
    assert running.returncode == 2
    assert "the disk is full" in said
    assert len(said.splitlines()) == 1
    assert all(p.name.startswith(".") or p == filler for p in small_disk.iterdir())
    filler.unlink()
    again = process(*arguments(job, half, small_disk), "--resume")
    assert again.code == 0, again.err
