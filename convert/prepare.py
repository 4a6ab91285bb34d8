"""What every conversion does first: prove the checkpoint, choose the weights, bring them into HF
names.

Shared by ``reshard`` and ``to_gguf``. All refusals happen here, before a byte is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..shardio.agreement import check_master_agreement
from ..shardio.assets import find_assets
from ..shardio.checkpoint import Checkpoint, Tensors
from ..shardio.compare import check_replicas
from ..shardio.coverage import prove
from ..shardio.dtypes import FLOAT32, is_float
from .naming import to_hf

_SAMPLE_ROWS = 64


def prepare(
    ckpt: Checkpoint,
    *,
    weights: str = "model",
    dtype: np.dtype | None = None,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    with_optimizer: bool = False,
    verify: bool = True,
    keep: str | None = None,
) -> Checkpoint:
    """Return the checkpoint in HF names with the chosen weights, proven whole.

    Args:
        ckpt: any opened checkpoint.
        weights: ``model`` (as the framework would load them) or ``master`` (the optimizer's fp32
            copies).
        dtype: cast floating weights to it (None: keep).
        vocab_size: true vocabulary size, where the checkpoint's is padded.
        tokenizer: folder or file that tells the vocabulary size otherwise.
        with_optimizer: keep and prove the optimizer states too.
        verify: compare replicas and a sample of master copies with the weights.
        keep: a naming that stays as it is, when the checkpoint has it.

    Raises:
        FormatError: holes, overlaps, short files, copies that disagree.
        ConfigError: no master weights, unknown vocabulary size, unmapped tensors.
    """
    prove(ckpt.weights, ckpt.path)
    states = ckpt.optimizer if with_optimizer or weights == "master" else {}
    for state, tensors in states.items():
        prove({f"{state}.{name}": t for name, t in tensors.items()}, ckpt.path)
    if verify:
        check_replicas(ckpt.weights, ckpt.replicas)
        bad = check_master_agreement(ckpt, sample=_SAMPLE_ROWS)
        if bad:
            raise FormatError(
                f"{ckpt.path}: {len(bad)} weights are not the rounded fp32 masters, so the files "
                f"do not belong together (swapped ranks or mixed steps?): {bad[0].name}: "
                f"{bad[0].problem}"
            )
    chosen = _choose(ckpt, weights)
    kept = ckpt.optimizer if with_optimizer else {}
    size = vocab_size if vocab_size is not None else vocab_size_of(ckpt, tokenizer)
    out = replace(ckpt, weights=chosen, optimizer=kept)
    if ckpt.naming != keep:
        out = to_hf(out, vocab_size=size)
    if tokenizer is not None and tokenizer.is_dir():
        out = replace(out, assets=find_assets([tokenizer, *(p.parent for p in out.assets)]))
    if with_optimizer and not kept:
        out = replace(out, warnings=(*out.warnings, "the checkpoint holds no optimizer state"))
    if dtype is None:
        return out
    cast = {n: _cast(t, dtype) for n, t in out.weights.items()}
    states = _with_masters(out, dtype)
    lossy = _rounded(ckpt, out.weights, dtype) if "master" not in states else ()
    return replace(out, weights=cast, optimizer=states, warnings=(*out.warnings, *lossy))


def _rounded(ckpt: Checkpoint, weights: Tensors, dtype: np.dtype) -> tuple[str, ...]:
    """What is told when the masters of a training run are rounded and not written along."""
    wide = [t for t in weights.values() if is_float(t.dtype) and t.dtype.itemsize > dtype.itemsize]
    if not ckpt.optimizer or not wide:
        return ()
    return (
        f"lossy: {len(wide)} masters ({wide[0].dtype.name}) are rounded to {dtype.name}, so "
        "training cannot go on exactly from these weights",
    )


def _with_masters(ckpt: Checkpoint, dtype: np.dtype) -> Mapping[str, Tensors]:
    """The optimizer states; trained fp32 weights that a cast would round become its masters."""
    if not ckpt.optimizer or "master" in ckpt.optimizer or dtype.itemsize >= FLOAT32.itemsize:
        return ckpt.optimizer
    trained = {n for states in ckpt.optimizer.values() for n in states}
    wide = {n: t for n, t in ckpt.weights.items() if n in trained and t.dtype == FLOAT32}
    return {**ckpt.optimizer, "master": wide} if wide else ckpt.optimizer


def _cast(tensor: Any, dtype: np.dtype) -> Any:
    return tensor.cast(dtype) if is_float(tensor.dtype) else tensor


def _choose(ckpt: Checkpoint, weights: str) -> Tensors:
    if weights == "model":
        return ckpt.weights
    if weights != "master":
        raise ConfigError(f"--weights is 'model' or 'master', not {weights!r}")
    masters: Mapping[str, Any] = ckpt.optimizer.get("master", {})
    if not masters:
        raise ConfigError(
            f"{ckpt.path}: has no fp32 master weights (found: {', '.join(ckpt.optimizer) or 'no'} "
            "optimizer states); use --weights model"
        )
    return {name: masters.get(name, tensor) for name, tensor in ckpt.weights.items()}


def vocab_size_of(ckpt: Checkpoint, tokenizer: Path | None = None) -> int | None:
    """The true vocabulary size: from config.json, else from the tokenizer's own files."""
    if ckpt.config and isinstance(ckpt.config.get("vocab_size"), int):
        return int(ckpt.config["vocab_size"])
    places = list(ckpt.assets)
    if tokenizer is not None:
        places = sorted(tokenizer.iterdir()) if tokenizer.is_dir() else [tokenizer]
    files = {p.name: p for p in places}
    if "tokenizer.json" in files:
        return _tokenizer_json_size(files["tokenizer.json"])
    if "tokenizer.model" in files:
        from sentencepiece import SentencePieceProcessor

        try:
            return int(
                SentencePieceProcessor(model_file=str(files["tokenizer.model"])).vocab_size()
            )
        except (OSError, RuntimeError, UnicodeDecodeError) as e:
            raise ConfigError(f"{files['tokenizer.model']}: not a sentencepiece model ({e})") from e
    return None


def _tokenizer_json_size(path: Path) -> int:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        vocab = data["model"]["vocab"]
        ids = [*vocab.values()] if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [t["id"] for t in data.get("added_tokens", [])]
        return int(max(ids)) + 1
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError) as e:
        raise ConfigError(f"{path}: not a tokenizer.json ({e})") from e
