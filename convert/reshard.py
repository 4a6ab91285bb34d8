"""``mconv.reshard``: any checkpoint into another layout, in one streaming pass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..shardio import Checkpoint, Layout, dtypes, open_checkpoint
from ..shardio.assets import find_assets, load_config, load_json
from ..shardio.staging import fingerprint, write_folder
from ..shardio.stream import Limits, OutFile, Progress
from ..shardio.writers import Writer, writer_for
from .model_order import in_model_order
from .naming import from_hf
from .prepare import prepare
from .provenance import options_of, provenance

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
    """Write a checkpoint in another layout and return what was (or would be) written.

    Args:
        src, config: an opened checkpoint or its path; config.json or model folder if it has none.
        dst: output folder.
        layout: target; ``Layout("hf")`` merges to Hugging Face safetensors, ``Layout("gguf")``
            makes ``dst`` a GGUF file. Its ``dtype`` casts the weights.
        weights: ``model`` or ``master`` (the optimizer's fp32 copies).
        with_optimizer: also write the optimizer states; None: where the target is a layout to train
            on and the source has them.
        vocab_size: true vocabulary size where the source is padded.
        tokenizer: tokenizer folder to take along (and to learn the vocabulary size from).
        verify: compare replicas and sample master copies before writing.
        force, resume: replace an existing target; continue an interrupted run.
        dry_run: plan and prove everything, write nothing.
        limits, progress: memory and threads; called with (bytes done, bytes in all).

    Raises:
        MconvError: any bad input, impossible request or full disk; nothing is left behind.
    """
    ckpt, layout = opened(src, config), layout or Layout("hf")
    if layout.format == GGUF:
        from .gguf_target import reshard_to_gguf  # which needs this module

        return reshard_to_gguf(
            ckpt, Path(dst), layout, with_optimizer=with_optimizer, weights=weights,
            vocab_size=vocab_size, tokenizer=tokenizer, verify=verify, force=force, resume=resume,
            dry_run=dry_run, limits=limits, progress=progress,
        )  # fmt: skip
    writer = writer_for(ckpt, layout, also=[GGUF])
    if with_optimizer is None:
        with_optimizer = writer.resumes and bool(ckpt.optimizer)
    ready = prepare(
        ckpt, weights=weights, dtype=dtypes.parse_cast(layout.dtype) if layout.dtype else None,
        vocab_size=vocab_size, tokenizer=Path(tokenizer) if tokenizer is not None else None,
        with_optimizer=with_optimizer, verify=verify, keep=writer.naming if writer.keeps else None,
    )  # fmt: skip
    work = _plan(ckpt, ready, writer, layout, weights, with_optimizer, dry_run=dry_run)
    if not dry_run:
        write_folder(
            Path(dst), work.files, plan=work.digest, sources=work.sources, force=force,
            resume=resume, limits=limits, progress=progress,
        )  # fmt: skip
    return work.report(Path(dst))


@dataclass(frozen=True, slots=True)
class _Work:
    """All that is to be written.

    Attributes:
        weights: as they are written, with the writer's names.
        files: all of them.
        sources: every file that is read.
        digest: SHA-256 of the place of every byte and of path, size and time of every source.
        warnings: what a user should know.
    """

    weights: Checkpoint
    files: Sequence[OutFile]
    sources: set[Path]
    digest: str
    warnings: tuple[str, ...]

    def report(self, target: Path) -> ReshardReport:
        """Describe it."""
        sizes = {f.name: f.size for f in self.files}
        parameters = self.weights.num_parameters
        return ReshardReport(target, sizes, len(self.weights.weights), parameters, self.warnings)


def _plan(
    ckpt: Checkpoint,
    ready: Checkpoint,
    writer: Writer,
    layout: Layout,
    weights: str,
    with_optimizer: bool,
    *,
    dry_run: bool,
) -> _Work:
    """Lay all files out; ``ready`` has Hugging Face names, or those that the writer keeps."""
    ready = from_hf(in_model_order(ready) if writer.ordered else ready, writer.naming)
    planned = writer.plan(ready, layout)
    groups = (ckpt.weights, *(ckpt.optimizer.values() if with_optimizer else ()))
    sources = {path for group in groups for t in group.values() for path, _, _ in t.spans()}
    asked = json.dumps([weights, layout.format, options_of(layout)])
    digest = "0" * 64 if dry_run else fingerprint(planned.files, sources, asked)
    told = provenance(
        ckpt, layout, planned, weights=weights, digest=digest, sources=sources,
        notes=ready.warnings,
    )  # fmt: skip
    files = [*planned.files, told]
    return _Work(ready, files, sources, digest, (*ready.warnings, *planned.warnings))


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
