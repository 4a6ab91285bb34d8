"""Several processes write one folder: the same bytes as one, all or nothing, resumable."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mconv.errors import FormatError, MconvError, OutputError
from mconv.shardio import from_array
from mconv.shardio.payload import Render, TensorPayload
from mconv.shardio.shares import Share, split, split_files
from mconv.shardio.staging import staging_folder, write_folder, write_loose
from mconv.shardio.stream import Limits, OutFile
from mconv.shardio.team import together


@dataclass
class Threads:
    """A team of threads of this process."""

    size: int
    barrier: threading.Barrier = field(init=False)
    values: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)
        self.values = [None] * self.size

    def run(self, work: Callable[[Member], Any]) -> list[Any]:
        """Results or errors by rank."""
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                found[rank] = work(Member(self, rank))
            except MconvError as e:
                found[rank] = e

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.size)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(30)
        return found


@dataclass
class Member:
    """One of them."""

    team: Threads
    rank: int

    @property
    def size(self) -> int:
        return self.team.size

    def gather(self, value: Any) -> list[Any]:
        self.team.values[self.rank] = value
        self.team.barrier.wait(30)
        found = list(self.team.values)
        self.team.barrier.wait(30)
        return found


@dataclass(frozen=True)
class Bad:
    """A payload that cannot be made."""

    error: MconvError
    nbytes: int = 1000

    def first_span(self) -> tuple[str, int]:
        return "z", 0

    def slabs(self, limit: int) -> Any:
        def make() -> bytes:
            raise self.error

        yield Render(0, self.nbytes, make)


def files(count: int = 7, rows: int = 40) -> list[OutFile]:
    made = []
    for k in range(count):
        data = np.random.default_rng(k).standard_normal((rows + k, 33)).astype(np.float32)
        payloads = [TensorPayload(from_array(data)), TensorPayload(from_array(data[:5]))]
        second = payloads[0].nbytes + 16
        size = second + payloads[1].nbytes
        made.append(OutFile(f"part/{k}.bin", size, ((0, payloads[0]), (second, payloads[1]))))
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@given(st.lists(st.integers(0, 10**6), max_size=200), st.integers(1, 9))
def test_shares_are_even_and_complete(sizes: list[int], count: int) -> None:
    owner = split(sizes, count)
    assert len(owner) == len(sizes)
    assert owner == split(sizes, count)
    load = [sum(n for n, o in zip(sizes, owner, strict=True) if o == r) for r in range(count)]
    run = sum(sizes) // (16 * count)  # a run ends with the item that fills it
    assert max(load) - min(load) <= max(sizes, default=0) + run + 1


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9)), max_size=60), st.integers(1, 5))
def test_whole_files_are_dealt_evenly_or_not_at_all(
    items: list[tuple[int, int]], count: int
) -> None:
    sizes, files = [n for n, _ in items], [{file} for _, file in items]
    owner = split_files(sizes, files, count)
    if owner is not None:
        assert len({(file, rank) for (_, file), rank in zip(items, owner, strict=True)}) == len(
            {file for _, file in items}
        )
        load = [sum(n for n, o in zip(sizes, owner, strict=True) if o == r) for r in range(count)]
        assert max(load) * count <= 1.1 * sum(sizes)
    dealt = [Share(rank, count).of(range(len(items)), sizes, files) for rank in range(count)]
    assert sorted(k for own in dealt for k in own) == list(range(len(items)))


def test_files_of_one_size_have_one_writer_each() -> None:
    files = [{k % 4} for k in range(40)]
    assert split_files([5] * 40, files, 2) == [k % 4 % 2 for k in range(40)]
    assert split_files([5] * 40, files, 3) is None
    assert split_files([5, 5], [{0, 1}, {2}], 2) is None  # read once for several files


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_team_writes_the_same_bytes(tmp_path: Path, count: int) -> None:
    write_folder(tmp_path / "one", files(), plan="p")
    done = Threads(count).run(
        lambda team: write_folder(
            tmp_path / "many", files(), plan="p", limits=Limits(threads=1, team=team)
        )
    )
    assert done == [None] * count
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert {p.name for p in tmp_path.iterdir()} == {"one", "many"}
    flat = [OutFile(f.name[5:], f.size, f.parts) for f in files()]
    for again in (False, True):
        loose = Threads(count).run(
            lambda team: write_loose(
                tmp_path / "loose" / "x", flat, plan="p", limits=Limits(threads=1, team=team)
            )
        )
        assert all(isinstance(found, OutputError if again else list) for found in loose)
        assert content(tmp_path / "loose") == content(tmp_path / "one")


@pytest.mark.parametrize("count", [2, 3])
def test_forked_processes_write_the_same_bytes(tmp_path: Path, count: int) -> None:
    said: list[tuple[int, int]] = []
    write_folder(tmp_path / "one", files(), plan="p")
    limits = Limits(processes=count)
    write_folder(
        tmp_path / "many", files(), plan="p", limits=limits, progress=lambda *x: said.append(x)
    )
    assert content(tmp_path / "many") == content(tmp_path / "one")
    total = sum(p.nbytes for f in files() for _, p in f.parts)
    assert said[-1] == (total, total)


def bad(error: MconvError) -> list[OutFile]:
    return [*files(), OutFile("bad", 1000, ((0, Bad(error)),))]


def test_bad_input_on_one_rank_leaves_nothing(tmp_path: Path) -> None:
    done = Threads(3).run(
        lambda team: write_folder(
            tmp_path / "out", bad(FormatError("short")), plan="p",
            limits=Limits(threads=1, team=team),
        )
    )  # fmt: skip
    assert all(isinstance(e, MconvError) for e in done)
    assert sum(isinstance(e, FormatError) for e in done) == 1
    assert all("short" in str(e) for e in done)
    assert not any(tmp_path.iterdir())
    with pytest.raises(FormatError, match="short"):
        write_folder(
            tmp_path / "out", bad(FormatError("short")), plan="p", limits=Limits(processes=2)
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("processes", [1, 3])
def test_a_full_disk_can_be_resumed_by_another_number(tmp_path: Path, processes: int) -> None:
    target = tmp_path / "out"
    done = Threads(2).run(
        lambda team: write_folder(
            target, bad(OutputError("full")), plan="p", limits=Limits(threads=1, team=team)
        )
    )
    assert all(isinstance(e, OutputError) and "full" in str(e) for e in done)
    assert not target.exists()
    assert staging_folder(target).is_dir()
    good = [*files(), OutFile("bad", 1000, ((0, TensorPayload(from_array(np.ones(250, "f4")))),))]
    write_folder(target, good, plan="p", resume=True, limits=Limits(processes=processes))
    assert sorted(content(target)) == sorted([*(f"{k}.bin" for k in range(7)), "bad"])
    write_folder(tmp_path / "one", good, plan="p")
    assert content(target) == content(tmp_path / "one")


def test_a_killed_process_is_told(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Deadly(Bad):
        def slabs(self, limit: int) -> Any:
            yield Render(0, self.nbytes, lambda: os.kill(os.getpid(), signal.SIGKILL) or b"")

    work = [*files(), OutFile("bad", 1000, ((0, Deadly(FormatError(""))),))]
    with pytest.raises(OutputError, match=r"killed.*--resume"):
        write_folder(tmp_path / "out", work, plan="p", limits=Limits(processes=2))
    assert not (tmp_path / "out").exists()


def test_ranks_that_see_different_sources_stop(tmp_path: Path) -> None:
    done = Threads(2).run(
        lambda team: write_folder(
            tmp_path / "out", files(), plan=str(team.rank), limits=Limits(threads=1, team=team)
        )
    )
    assert all(isinstance(e, OutputError) and "different work" in str(e) for e in done)
    assert not (tmp_path / "out").exists()


def test_refusals_of_the_first_reach_all(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = Threads(2).run(
        lambda team: write_folder(tmp_path / "out", files(), plan="p", limits=Limits(team=team))
    )
    assert all(isinstance(e, OutputError) and "exists" in str(e) for e in done)


def test_together_returns_each_ones_own(tmp_path: Path) -> None:
    assert Threads(3).run(lambda team: together(team, lambda: team.rank)) == [0, 1, 2]
