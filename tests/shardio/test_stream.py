"""The streaming writer: exact bytes for any thread count and budget, atomic, resumable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.errors import FormatError, OutputError
from mconv.shardio.box import extent
from mconv.shardio.chunked import Chunked
from mconv.shardio.payload import BytesPayload, Copy, EncodedPayload, TensorPayload, row_slabs
from mconv.shardio.source import FileSource
from mconv.shardio.staging import staging_folder, write_folder, write_loose
from mconv.shardio.stream import Journal, Limits, OutFile, write_files
from mconv.shardio.tensor import LazyTensor, concat, from_array


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(1, 40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_slabs_tile_a_tensor_in_order(shape: list[int], limit: int, whole_rows: bool) -> None:
    dims = tuple(shape)
    x = np.arange(int(np.prod(dims))).reshape(dims)
    seen = []
    for (lo, hi), start in row_slabs(dims, limit, whole_rows=whole_rows):
        part = x[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))].reshape(-1)
        assert part[0] == start
        row = dims[-1] if dims and whole_rows else 1
        assert part.size <= max(limit, row)
        assert extent((lo, hi))[-1:] == dims[-1:] or not whole_rows
        seen.append(part)
    np.testing.assert_array_equal(np.concatenate(seen) if seen else [], x.reshape(-1))


@pytest.fixture
def source(tmp_path: Path) -> tuple[np.ndarray, Chunked]:
    x = np.random.default_rng(0).standard_normal((257, 130)).astype(np.float32)
    path = tmp_path / "source.bin"
    path.write_bytes(b"header!" + x.tobytes())
    return x, Chunked.contiguous(FileSource.of(path), 7, x.shape, x.dtype)


def expressions(x: np.ndarray, t: LazyTensor) -> list[tuple[np.ndarray, LazyTensor]]:
    left, right = t.slice((slice(None), slice(0, 60))), t.slice((slice(None), slice(60, 130)))
    return [
        (x, t),
        (x[10:20], t.slice((slice(10, 20),))),
        (np.concatenate([x[:, 60:], x[:, :60]], 1), concat([right, left], 1)),
        (x.T, t.permute((1, 0))),
        ((x * 2).astype(np.float64), t.map(lambda v: v * 2).cast(np.dtype(np.float64))),
        (
            np.concatenate([x[100:], x[:100]]),
            concat([t.slice((slice(100, 257),)), t.slice((slice(0, 100),))]),
        ),
        (x[:0], t.slice((slice(0, 0),))),
    ]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [1 << 20, 1 << 30])
def test_bytes_do_not_depend_on_threads_or_memory(
    tmp_path: Path, source: tuple[np.ndarray, Chunked], threads: int, memory: int
) -> None:
    parts, expected, at = [(0, BytesPayload(b"HEAD"))], b"HEAD", 4
    for x, t in expressions(*source):
        payload = TensorPayload(t)
        parts.append((at, payload))
        at += payload.nbytes
        expected += np.ascontiguousarray(x).tobytes()
    seen: list[tuple[int, int]] = []
    write_files(
        tmp_path / "out",
        [OutFile("a/b.bin", at, tuple(parts))],
        limits=Limits(max_memory=memory, threads=threads),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (tmp_path / "out/a/b.bin").read_bytes() == expected
    assert seen[-1] == (at, at)


def test_contiguous_pieces_become_kernel_copies(source: tuple[np.ndarray, Chunked]) -> None:
    _, t = source
    halves = concat([t.slice((slice(100, 257),)), t.slice((slice(0, 100),))])
    slabs = list(TensorPayload(halves).slabs(1 << 20))
    assert len(slabs) == 2
    assert all(isinstance(s, Copy) for s in slabs)


def test_encoded_rows_land_in_order(tmp_path: Path) -> None:
    x = np.arange(3 * 50 * 8, dtype=np.float32).reshape(3, 50, 8)
    payload = EncodedPayload(
        from_array(x), lambda rows: rows.astype(np.uint8)[:, :4].copy(), row_bytes=4
    )
    write_files(
        tmp_path, [OutFile("q", payload.nbytes, ((0, payload),))], limits=Limits(1 << 20, 2)
    )
    assert (tmp_path / "q").read_bytes() == x.astype(np.uint8)[:, :, :4].tobytes()


def files(t: LazyTensor) -> list[OutFile]:
    return [OutFile("x.bin", t.nbytes, ((0, TensorPayload(t)),))]


def test_a_folder_appears_whole_or_not_at_all(
    tmp_path: Path, source: tuple[np.ndarray, Chunked]
) -> None:
    x, t = source
    target = tmp_path / "out"
    write_folder(target, files(t), plan="p")
    assert (target / "x.bin").read_bytes() == x.tobytes()
    assert sorted(p.name for p in target.iterdir()) == ["x.bin"]
    assert not staging_folder(target).exists()
    with pytest.raises(OutputError, match="--force"):
        write_folder(target, files(t), plan="p")
    write_folder(target, files(t.slice((slice(0, 1),))), plan="p2", force=True)
    assert (target / "x.bin").stat().st_size == 130 * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source.bin"]


def test_a_short_source_leaves_nothing(tmp_path: Path, source: tuple[np.ndarray, Chunked]) -> None:
    _, t = source
    os.truncate(tmp_path / "source.bin", 5000)
    with pytest.raises(FormatError, match="file ends at byte 5000"):
        write_folder(tmp_path / "out", files(t), plan="p")
    with pytest.raises(FormatError, match="file ends at byte 5000"):
        write_loose(tmp_path / "out.gguf", files(t.permute((1, 0))), plan="p")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.bin"]


def test_full_disk_is_one_clear_error(
    tmp_path: Path, source: tuple[np.ndarray, Chunked], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_folder(tmp_path / "out", files(source[1]), plan="p")
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_said_before_writing(tmp_path: Path) -> None:
    huge = Chunked.contiguous(
        FileSource(Path("/nowhere"), 1 << 60), 0, (1 << 50,), np.dtype(np.uint8)
    )
    with pytest.raises(OutputError, match=r"only .* MB are free"):
        write_folder(tmp_path / "out", files(huge), plan="p")
    assert list(tmp_path.iterdir()) == []


def test_resume_does_only_what_is_left(tmp_path: Path) -> None:
    folder = staging_folder(tmp_path / "out")
    folder.mkdir()
    parts = [from_array(np.full(100, k, np.uint8)) for k in range(3)]
    out = [OutFile("x.bin", 300, tuple((100 * k, TensorPayload(p)) for k, p in enumerate(parts)))]
    (folder / ".mconv-plan").write_text("p")
    (folder / "x.bin").write_bytes(b"\xff" * 300)  # part 1 is claimed done: its bytes must stay
    Journal(folder / ".mconv-journal").add([(0, 1)])
    with pytest.raises(OutputError, match="other sources"):
        write_folder(tmp_path / "out", out, plan="another", resume=True)
    write_folder(tmp_path / "out", out, plan="p", resume=True)
    data = (tmp_path / "out/x.bin").read_bytes()
    assert data == bytes(100) + b"\xff" * 100 + b"\x02" * 100


def test_a_torn_journal_line_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("0 1 ok\n0 2 o")
    assert Journal.load(tmp_path / "j").done == {(0, 1)}


_KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from mconv.shardio.payload import Render
from mconv.shardio.staging import write_folder
from mconv.shardio.stream import OutFile

class Slow:
    nbytes = 100
    def first_span(self): return ("", 0)
    def slabs(self, limit):
        for k in range(100):
            def make():
                time.sleep(0.02)
                return bytes([7])
            yield Render(k, 1, make)

write_folder(Path(sys.argv[1]), [OutFile("x.bin", 100, ((0, Slow()),))], plan="p", force=True)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_kill_leaves_nothing_that_looks_finished(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "out"
    if existing:
        target.mkdir()
        (target / "old").write_text("old")
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(target)])
    deadline = time.monotonic() + 30
    while not (staging_folder(target) / "x.bin").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.name for p in target.iterdir()] == ["old"] if existing else not target.exists()


def test_two_runs_on_one_target_are_refused(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path / "out")])
    deadline = time.monotonic() + 30
    while not (staging_folder(tmp_path / "out") / "x.bin").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        with pytest.raises(OutputError, match="another mconv"):
            write_folder(tmp_path / "out", files(from_array(np.zeros(3, np.uint8))), plan="q")
    finally:
        process.kill()
        process.wait()


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "source.bin"
    for value in (b"old data", b"new data"):
        path.unlink(missing_ok=True)
        path.write_bytes(value)
        assert FileSource.of(path).read(0, 8) == value
