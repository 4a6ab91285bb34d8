"""Holes, overlaps and short files are named before anything is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.errors import FormatError
from mconv.shardio.chunked import Chunk, Chunked
from mconv.shardio.coverage import flaws, prove
from mconv.shardio.source import MemorySource

SOURCE = MemorySource(Path("rank0.bin"), bytes(4096))
F32 = np.dtype(np.float32)


def piece(lo: tuple[int, ...], hi: tuple[int, ...], offset: int = 0) -> Chunk:
    cols = hi[-1] - lo[-1]
    return Chunk(lo, hi, SOURCE, offset, (cols * 4, 4))


def test_a_whole_tensor_has_no_flaws() -> None:
    t = Chunked((4, 4), F32, [piece((0, 0), (2, 4)), piece((2, 0), (4, 2)), piece((2, 2), (4, 4))])
    assert flaws({"w": t}) == []


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([piece((0, 0), (2, 4))], r"8 of 16 elements are in no file, first hole at \[2:4, 0:4\]"),
        ([piece((0, 0), (3, 4)), piece((2, 0), (4, 4))], "overlaps"),
        ([piece((0, 0), (4, 4), offset=4090)], "4096 bytes, the tensor needs"),
        ([piece((0, 0), (5, 4))], "outside the shape"),
    ],
)
def test_flaws_are_named(chunks: list[Chunk], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        prove({"layer.weight": Chunked((4, 4), F32, chunks)}, "ckpt")


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 4), max_size=6))
@settings(max_examples=300, deadline=None)
def test_verdict_equals_counting_every_element(boxes: list[tuple[int, ...]]) -> None:
    count = np.zeros((5, 5), int)
    chunks = []
    for a, b, c, d in boxes:
        lo, hi = (min(a, b), min(c, d)), (max(a, b), max(c, d))
        if lo[0] < hi[0] and lo[1] < hi[1]:
            count[lo[0] : hi[0], lo[1] : hi[1]] += 1
            chunks.append(piece(lo, hi))
    whole = bool((count == 1).all())
    assert (flaws({"w": Chunked((5, 5), F32, chunks)}) == []) == whole
