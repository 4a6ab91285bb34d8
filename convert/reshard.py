"""``mconv.reshard``: any checkpoint into another layout, in one streaming pass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigError, did_you_mean
from ..shardio import Checkpoint, Layout, LazyTensor, dtypes, open_checkpoint
from ..shardio.assets import find_assets, load_config, load_json
from ..shardio.hf_writer import DEFAULT_SHARD, plan_copies, plan_json, plan_tensors
from ..shardio.staging import fingerprint, write_folder
from ..shardio.stream import Limits, OutFile, Progress
from .prepare import prepare

_TARGETS = ("hf",)
_HEADS = ("lm_head.weight",)


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
    with_optimizer: bool = False,
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
        layout: target; ``Layout("hf")`` merges to Hugging Face safetensors. Its ``dtype`` casts the
            weights.
        weights: ``model`` or ``master`` (the optimizer's fp32 copies).
        with_optimizer: also write the optimizer states (``optimizer*.safetensors``).
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
    layout = _supported(layout or Layout("hf"))
    ready = prepare(
        ckpt,
        weights=weights,
        dtype=dtypes.parse(layout.dtype) if layout.dtype else None,
        vocab_size=vocab_size,
        tokenizer=Path(tokenizer) if tokenizer is not None else None,
        with_optimizer=with_optimizer,
        verify=verify,
    )
    files, report = _plan(ckpt, ready, Path(dst), layout, weights, with_optimizer)
    if not dry_run:
        sources = {p for t in ckpt.weights.values() for p, _, _ in t.spans()}
        plan = fingerprint(files, sources, json.dumps([weights, layout.dtype]))
        write_folder(
            report.target,
            files,
            plan=plan,
            force=force,
            resume=resume,
            limits=limits,
            progress=progress,
        )
    return report


def _supported(layout: Layout) -> Layout:
    if layout.format not in _TARGETS:
        raise ConfigError(
            f"cannot write format {layout.format!r}{did_you_mean(layout.format, _TARGETS)}; "
            f"targets: {', '.join(_TARGETS)}"
        )
    return layout


def opened(src: Checkpoint | str | Path, config: str | Path | None) -> Checkpoint:
    """Open a path, or give an opened checkpoint another config.

    Raises:
        MconvError: the path cannot be opened, or the config cannot be read.
    """
    if not isinstance(src, Checkpoint):
        return open_checkpoint(src, config=config)
    if config is None:
        return src
    path = Path(config)
    assets = find_assets([path]) if path.is_dir() else (path,)
    found = load_json(path) if path.is_file() else load_config(assets)
    return replace(src, config=found or src.config, assets=(*assets, *src.assets))


def _plan(
    ckpt: Checkpoint,
    ready: Checkpoint,
    target: Path,
    layout: Layout,
    weights: str,
    with_optimizer: bool,
) -> tuple[list[OutFile], ReshardReport]:
    """Plan every file of the folder and say what it will hold."""
    warnings = list(ready.warnings)
    tensors = _with_aliases(ready, warnings)
    limit = layout.max_shard_size or DEFAULT_SHARD
    files = plan_tensors("model", tensors, limit)
    if with_optimizer:
        states = _optimizer(ready)
        files += plan_tensors("optimizer", states, limit) if states else []
        if not states:
            warnings.append("the checkpoint holds no optimizer state")
    if ready.config is not None:
        files.append(plan_json("config.json", _config(ready, tensors)))
    else:
        warnings.append("no config.json found: give one with --config to get a loadable model")
    files += plan_copies([p for p in ready.assets if p.name != "config.json"], files)
    files.append(plan_json("mconv.json", _provenance(ckpt, layout, weights)))
    return files, _report(target, files, tensors, warnings)


def _report(
    target: Path, files: list[OutFile], tensors: Mapping[str, LazyTensor], warnings: list[str]
) -> ReshardReport:
    return ReshardReport(
        target,
        {f.name: f.size for f in files},
        len(tensors),
        sum(t.size for t in tensors.values()),
        tuple(warnings),
    )


def _with_aliases(ckpt: Checkpoint, warnings: list[str]) -> dict[str, LazyTensor]:
    """Weights to write:

    the tied head is left out (HF re-ties it), any other alias becomes a copy.
    """
    tensors = dict(ckpt.weights)
    for alias, owner in ckpt.tied.items():
        if alias in tensors or owner not in tensors:
            continue
        if alias not in _HEADS:
            warnings.append(f"{alias} shares memory with {owner}: written as a copy of its own")
            tensors[alias] = tensors[owner]
    return tensors


def _optimizer(ckpt: Checkpoint) -> dict[str, LazyTensor]:
    return {
        f"{state}.{name}": tensor
        for state, tensors in ckpt.optimizer.items()
        for name, tensor in tensors.items()
    }


def _config(ckpt: Checkpoint, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """The config as found, with what the weights say: dtype, tied head, vocabulary rows."""
    assert ckpt.config is not None
    config = dict(ckpt.config)
    counts: dict[str, int] = {}
    for t in tensors.values():
        if dtypes.is_float(t.dtype):
            counts[dtypes.name(t.dtype)] = counts.get(dtypes.name(t.dtype), 0) + t.size
    if counts:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = max(counts, key=lambda k: counts[k])
    if any(alias in _HEADS for alias in ckpt.tied):
        config["tie_word_embeddings"] = True
    return config


def _provenance(ckpt: Checkpoint, layout: Layout, weights: str) -> dict[str, Any]:
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
    }
