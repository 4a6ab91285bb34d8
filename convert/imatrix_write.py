"""Writing importance matrices as ``llama-imatrix`` does, and the GGUF names of weights.

Format: GGUF with ``general.type`` = ``imatrix``; for each weight a tensor ``NAME.in_sum2``, the
sums of the squares of its inputs, and ``NAME.counts``, how many inputs there were, one row per
expert where there are several. ``imatrix.py`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .architectures import complete_config, find_architecture
from .architectures._lines import table_lines
from .gguf.values import KeyValue, string, strings, u32
from .gguf.writer import TensorSpec, build_header

_F32 = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What went into a weight.

    Attributes:
        sums: float [matrices, columns], sums of squares; one matrix, or one per expert.
        counts: int [matrices], number of inputs.
    """

    sums: np.ndarray
    counts: np.ndarray


def gguf_names(config: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Return the GGUF name of each weight, and which matrix of it (of an expert, else 0).

    Args:
        config: ``config.json``.

    Raises:
        MconvError: the architecture is not known.
    """
    architecture = find_architecture(config)
    full = complete_config(config, architecture, {})
    tied = bool(full.get("tie_word_embeddings"))
    return {
        source: (line.outputs[0], index)
        for line in table_lines(architecture, full, tied=tied)
        if len(line.outputs) == 1
        for index, source in enumerate(line.sources)
    }


def write_imatrix(
    path: Path,
    entries: Mapping[str, Measured],
    *,
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
) -> None:
    """Write an importance matrix, all or nothing.

    Args:
        path: the file.
        entries: by GGUF name.
        datasets: the texts it was measured on.
        chunks: number of text chunks.
        chunk_size: tokens of a chunk.
    """
    metadata: list[KeyValue] = [
        string("general.type", "imatrix"),
        strings("imatrix.datasets", list(datasets)),
        u32("imatrix.chunk_count", chunks),
        u32("imatrix.chunk_size", chunk_size),
    ]
    arrays: list[tuple[str, np.ndarray]] = []
    for name, measured in sorted(entries.items()):
        arrays.append((f"{name}.in_sum2", measured.sums.astype("<f4")))
        arrays.append((f"{name}.counts", measured.counts.astype("<f4")[:, None]))
    specs = [TensorSpec(name, _shape(values), _F32, values.nbytes) for name, values in arrays]
    header = build_header(metadata, specs)
    part = path.with_name(f".{path.name}.tmp")
    with part.open("wb") as file:
        file.write(header.data)
        for offset, (_, values) in zip(header.offsets, arrays, strict=True):
            file.write(bytes(offset - file.tell()))
            file.write(values.tobytes())
        file.write(bytes(header.file_size - file.tell()))
    part.replace(path)


def _shape(values: np.ndarray) -> tuple[int, ...]:
    """Return the shape without a leading 1, which ggml does not write."""
    return values.shape if len(values) > 1 else values.shape[1:]
