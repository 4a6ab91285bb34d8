"""``reshard --to gguf``: the same file as ``to-gguf`` writes, its type from the layout's dtype."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, UnsupportedError
from ..shardio import Checkpoint, Layout, dtypes
from ..shardio.stream import Limits, Progress
from ..shardio.writers._common import only_axes
from .reshard import ReshardReport
from .to_gguf import to_gguf

_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def reshard_to_gguf(
    ckpt: Checkpoint,
    dst: Path,
    layout: Layout,
    *,
    with_optimizer: bool | None,
    weights: str,
    vocab_size: int | None,
    tokenizer: str | Path | None,
    verify: bool,
    force: bool,
    resume: bool,
    dry_run: bool,
    limits: Limits | None,
    progress: Progress | None,
) -> ReshardReport:
    """Write a GGUF file; arguments as for ``reshard``.

    Raises:
        MconvError: as ``to_gguf``; a layout that cuts or asks for optimizer states.
    """
    if with_optimizer:
        raise UnsupportedError("format 'gguf' holds weights only: write with --weights-only")
    report = to_gguf(
        ckpt,
        dst,
        _type(ckpt, layout),
        weights=weights,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        verify=verify,
        force=force,
        resume=resume,
        dry_run=dry_run,
        limits=limits,
        progress=progress,
    )
    return ReshardReport(
        report.target,
        {report.files[0]: report.nbytes},
        len(report.tensors),
        sum(t.tensor.size for t in report.tensors),
        report.warnings,
    )


def _type(ckpt: Checkpoint, layout: Layout) -> str:
    """The GGUF type of a layout: its dtype, else that of the weights.

    Raises:
        LayoutError: a layout that cuts.
        ConfigError: a dtype that a plain GGUF has not, or a shard size.
    """
    only_axes(layout)
    if layout.max_shard_size is not None:
        raise ConfigError("format 'gguf' is one file here; `mconv to-gguf` writes shards")
    if layout.dtype is not None:
        name = dtypes.name(dtypes.parse(layout.dtype))
        if name not in _TYPES:
            raise ConfigError(f"format 'gguf': the dtype is f32, f16 or bf16, not {layout.dtype}")
        return _TYPES[name]
    half = (dtypes.FLOAT16, dtypes.BFLOAT16)
    return "auto" if any(t.dtype in half for t in ckpt.weights.values()) else "f32"
