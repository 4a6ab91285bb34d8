"""``mconv.reshard``: any checkpoint into another layout, in one streaming pass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UnsupportedError
from ..shardio import Checkpoint, Layout, dtypes, open_checkpoint
from ..shardio.assets import find_assets, load_config, load_json
from ..shardio.safetensors_plan import plan_json
from ..shardio.staging import fingerprint, write_folder
from ..shardio.stream import Limits, OutFile, Progress
from ..shardio.writers import Planned, get_writer
from .model_order import in_model_order
from .naming import from_hf
from .prepare import prepare

GGUF = "gguf"  # a target, though not a training layout


@dataclass(frozen=True, slots=True)
class ReshardReport:
    """What a reshard wrote, or would write.

    Attributes:
        target: the output folder.
        files: name to bytes.
        tensors: number of weight tensors.
        parameters: number of weight elements.
        warnings: what a user should know.
    """

    target: Path
    files: Mapping[str, int]
    tensors: int
    parameters: int
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def reshard(
    src: Checkpoint | str | Path,
    dst: str | Path,
    layout: Layout | None = None,
    *,
    weights: str = "model",
    with_optimizer: bool | None = None,
    vocab_size: int | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    verify: bool = True,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ReshardReport:
    """Write a checkpoint in another layout.

    Args:
        src: an opened checkpoint or its path.
        dst: output folder.
        layout: target; ``Layout("hf")`` merges to Hugging Face safetensors, ``Layout("gguf")``
            makes ``dst`` a GGUF file. Its ``dtype`` casts the weights.
        weights: ``model`` or ``master`` (the optimizer's fp32 copies).
        with_optimizer: also write the optimizer states; None: where the target is a layout to train
            on and the source has them.
        vocab_size: true vocabulary size where the source is padded.
        config: config.json or model folder, where the source has none.
        tokenizer: tokenizer folder to take along (and to learn the vocabulary size from).
        verify: compare replicas and sample master copies before writing.
        force: replace an existing target.
        resume: continue an interrupted run.
        dry_run: plan and prove everything, write nothing.
        limits: memory and threads.
        progress: called with (bytes done, bytes in all).

    Returns:
        What was (or would be) written.

    Raises:
        MconvError: any bad input, impossible request or full disk; nothing is left behind.
    """
    ckpt = opened(src, config)
    layout = layout or Layout("hf")
    if layout.format == GGUF:
        if with_optimizer:
            raise UnsupportedError("format 'gguf' holds weights only: write with --weights-only")
        from .gguf_target import reshard_to_gguf  # which needs this module

        return reshard_to_gguf(
            ckpt, Path(dst), layout, weights=weights, vocab_size=vocab_size, tokenizer=tokenizer,
            verify=verify, force=force, resume=resume, dry_run=dry_run, limits=limits,
            progress=progress,
        )  # fmt: skip
    writer = get_writer(layout.format, also=[GGUF])
    if with_optimizer is None:
        with_optimizer = writer.resumes and bool(ckpt.optimizer)
    ready = prepare(
        ckpt,
        weights=weights,
        dtype=dtypes.parse_cast(layout.dtype) if layout.dtype else None,
        vocab_size=vocab_size,
        tokenizer=Path(tokenizer) if tokenizer is not None else None,
        with_optimizer=with_optimizer,
        verify=verify,
    )
    ready = from_hf(in_model_order(ready) if writer.ordered else ready, writer.naming)
    planned = writer.plan(ready, layout)
    groups = (ckpt.weights, *(ckpt.optimizer.values() if with_optimizer else ()))
    sources = {p for g in groups for t in g.values() for p, _, _ in t.spans()}
    options = json.dumps([weights, layout.dtype, layout.describe()])
    plan = "0" * 64 if dry_run else fingerprint(planned.files, sources, options)
    provenance = plan_json("mconv.json", _provenance(ckpt, layout, weights, planned, plan))
    files = [*planned.files, provenance]
    report = _report(Path(dst), ready, planned, files)
    if not dry_run:
        write_folder(
            report.target, files, plan=plan, sources=sources, force=force, resume=resume,
            limits=limits, progress=progress,
        )  # fmt: skip
    return report


def opened(
    src: Checkpoint | str | Path, config: str | Path | None, *, decode: bool = True
) -> Checkpoint:
    """Open a path, or give an opened checkpoint another config.

    Args:
        src: a path or an opened checkpoint.
        config: a config.json or a model folder.
        decode: open quantized weights as plain ones.

    Raises:
        MconvError: the path cannot be opened, or the config cannot be read.
    """
    if not isinstance(src, Checkpoint):
        return open_checkpoint(src, config=config, decode=decode)
    if config is None:
        return src
    path = Path(config)
    assets = find_assets([path]) if path.is_dir() else (path,)
    found = load_json(path) if path.is_file() else load_config(assets)
    return replace(src, config=found or src.config, assets=(*assets, *src.assets))


def _report(
    target: Path, ready: Checkpoint, planned: Planned, files: Sequence[OutFile]
) -> ReshardReport:
    return ReshardReport(
        target,
        {f.name: f.size for f in files},
        len(ready.weights),
        ready.num_parameters,
        (*ready.warnings, *planned.warnings),
    )


def _provenance(
    ckpt: Checkpoint, layout: Layout, weights: str, planned: Planned, plan: str
) -> dict[str, Any]:
    """What ``mconv.json`` says: where the output comes from, what it is, what it lacks.

    ``plan`` is a SHA-256 of the place of every byte and of path, size and time of every source.
    """
    return {
        "mconv": __version__,
        "source": {
            "path": str(ckpt.path),
            "format": ckpt.format,
            "layout": ckpt.layout.describe(),
            "step": ckpt.step,
        },
        "layout": layout.describe(),
        "weights": weights,
        "not_carried": list(planned.warnings),
        "plan": plan,
        "files": {f.name: f.size for f in planned.files},
    }
