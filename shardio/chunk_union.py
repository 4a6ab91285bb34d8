"""Join the pieces that several ranks saved of one tensor.

Pieces for the same box are copies: the first is the tensor's, the others must be equal to it and
become further whole tensors, to be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .box import Box, Index
from .chunked import Chunk, Chunked


def unite(
    shape: Sequence[int], dtype: np.dtype, chunks: Iterable[Chunk]
) -> tuple[Chunked, tuple[Chunked, ...]]:
    """Return (tensor, copies of it); holes and overlaps are left for the coverage proof."""
    by_box: dict[Box, list[Chunk]] = {}
    for c in chunks:
        by_box.setdefault((c.lo, c.hi), []).append(c)
    size: Index = tuple(shape)
    whole = Chunked(size, dtype, [found[0] for _, found in sorted(by_box.items())])
    count = max(map(len, by_box.values()), default=1)
    rounds = (
        [(by_box[c.lo, c.hi][k : k + 1] or [c])[0] for c in whole.chunks] for k in range(1, count)
    )
    return whole, tuple(Chunked(size, dtype, pieces) for pieces in rounds)
