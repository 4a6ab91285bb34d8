"""Holes, overlaps and short files are named before anything is read."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.errors import FormatError
from mconv.shardio.chunked import Chunk, Chunked
from mconv.shardio.coverage import flaws, prove
from mconv.shardio.flat_buffer import Deferred
from mconv.shardio.registry import open_checkpoint
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


@given(st.data())
def test_many_chunks_are_proven_as_few_are(data: st.DataObject) -> None:
    """Grids are recognised at once; whatever is no grid gets the same verdict as by the sweep."""
    source = MemorySource(Path("f"), bytes(4096))
    axes = [sorted(data.draw(st.sets(st.integers(1, 5), max_size=3))) for _ in range(2)]
    cuts = [[0, *a, 6] for a in axes]
    chunks = [
        Chunk((a, c), (b, d), source, 4 * (6 * a + c), (24, 4))
        for a, b in pairwise(cuts[0])
        for c, d in pairwise(cuts[1])
    ]
    for _ in range(data.draw(st.integers(0, 2))):
        k = data.draw(st.integers(0, len(chunks) - 1))
        how = data.draw(st.sampled_from(("drop", "twice", "grow", "outside", "shift", "short")))
        c = chunks[k]
        if how == "drop" and len(chunks) > 1:
            del chunks[k]
        elif how == "twice":
            chunks.append(c)
        elif how == "grow":
            chunks[k] = replace(c, hi=(c.hi[0] + 1, c.hi[1]))
        elif how == "outside":
            chunks[k] = replace(c, offset=data.draw(st.sampled_from((-4, 4096, 2**63))))
        elif how == "shift":
            chunks[k] = c.moved((1, 0))
        else:
            chunks[k] = replace(c, hi=(c.hi[0], max(c.lo[1] + 1, c.hi[1] - 1)))
    data.draw(st.randoms()).shuffle(chunks)
    verdicts = []
    for many in (1, 10**9):
        with mock.patch("mconv.shardio.coverage._MANY", many):
            verdicts.append(flaws({"w": Chunked((6, 6), np.dtype(np.float32), chunks)}))
    assert verdicts[0] == verdicts[1]


def test_outlines_are_what_the_chunks_are(fixtures_dir: Path) -> None:
    """Tensors of flat vectors are proven without their chunk lists: the lists must agree."""
    seen = 0
    for folder in sorted(fixtures_dir.glob("deepspeed/*/ckpt")):
        ckpt = open_checkpoint(folder)
        for group in (ckpt.weights, *ckpt.optimizer.values()):
            for name, tensor in group.items():
                for leaf in tensor.leaves():
                    if isinstance(leaf, Deferred) and leaf.proven:
                        seen += 1
                        paths = [c.source.path for c in leaf.chunks]
                        assert set(leaf.files()) == set(paths), (folder, name)
                        plain = Chunked(leaf.shape, leaf.dtype, leaf.chunks)
                        assert not flaws({name: plain}), (folder, name)
    assert seen > 500
