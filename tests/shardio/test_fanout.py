"""Groups of payloads: one read feeds several files, with the same bytes and the same resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from mconv.errors import FormatError
from mconv.shardio.payload import BytesPayload, Joint, Member, Render
from mconv.shardio.stream import Journal, Limits, OutFile, write_files


@dataclass
class Multiples:
    """A source of bytes; member k holds each byte k + 1 times."""

    data: np.ndarray
    members: int = 3
    reads: list[tuple[int, ...]] = field(default_factory=list)
    broken: bool = False

    @property
    def sizes(self) -> list[int]:
        return [self.data.size * (k + 1) for k in range(self.members)]

    def first_span(self) -> tuple[str, int]:
        return "source", 0

    def joints(self, limit: int, members: Sequence[int]) -> Iterator[Joint]:
        for at in range(0, self.data.size, 100):
            part = self.data[at : at + 100]
            places = tuple((k, at * (k + 1), part.size * (k + 1)) for k in members)
            yield Joint(places, lambda part=part, which=tuple(members): self._make(part, which))

    def _make(self, part: np.ndarray, which: tuple[int, ...]) -> Iterator[np.ndarray]:
        if self.broken:
            raise FormatError("the source is broken")
        self.reads.append(which)
        for k in which:
            yield np.repeat(part, k + 1)


@pytest.fixture
def group() -> Multiples:
    return Multiples(np.arange(1050, dtype=np.int64).astype(np.uint8))


def files(group: Multiples) -> list[OutFile]:
    head = BytesPayload(b"head")
    return [
        OutFile(f"{k}.bin", 4 + size, ((0, head), (4, Member(group, k))))
        for k, size in enumerate(group.sizes)
    ]


@pytest.mark.parametrize("threads", [1, 4])
def test_one_read_fills_all_files(tmp_path: Path, group: Multiples, threads: int) -> None:
    write_files(tmp_path, files(group), limits=Limits(threads=threads))
    for k in range(3):
        data = (tmp_path / f"{k}.bin").read_bytes()
        assert data == b"head" + np.repeat(group.data, k + 1).tobytes()
    assert group.reads == [(0, 1, 2)] * 11


def test_finished_members_are_not_made_again(tmp_path: Path, group: Multiples) -> None:
    write_files(tmp_path, files(group))
    (tmp_path / "journal").write_text("1 1 ok\n")
    group.reads.clear()
    seen: list[int] = []
    write_files(
        tmp_path,
        files(group),
        journal=Journal.load(tmp_path / "journal"),
        progress=lambda done, total: seen.append(total - done),
    )
    assert group.reads == [(0, 2)] * 11
    assert seen[-1] == 0


def test_a_member_is_a_payload_of_its_own(group: Multiples) -> None:
    out = np.zeros(group.sizes[1], np.uint8)
    for slab in Member(group, 1).slabs(1 << 20):
        assert isinstance(slab, Render)
        out[slab.at : slab.at + slab.nbytes] = slab.make()
    np.testing.assert_array_equal(out, np.repeat(group.data, 2))
    assert Member(group, 1).first_span() == ("source", 0)


def test_an_error_in_a_group_reaches_the_caller(tmp_path: Path, group: Multiples) -> None:
    group.broken = True
    with pytest.raises(FormatError, match="source is broken"):
        write_files(tmp_path, files(group))
