"""From ``[data]`` to samples: text is encoded, documents are packed, once; then all is mapped."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ...errors import ConfigError
from ..data import TokenData
from ..settings import RunConfig
from ..settings.sections import DataConfig
from .pack import pack
from .token_file import open_token_file
from .tokenize import tokenize
from .tokenizer import FAST, MODEL, digest

_TOKEN_FILES = (".npy", ".bin")


def open_on_all(config: RunConfig, tokens: Path | None = None) -> TokenData:
    """Open a run's training data, or others prepared alike; every rank calls this.

    Raises:
        ConfigError: as ``open_tokens``, no tokenizer, or the tokens are of another one.
        FormatError: damaged files.
    """
    if not digest(config.data.tokenizer):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer}: no {FAST} or {MODEL} in there; name the "
            "folder of one, which is saved with the model"
        )
    data = config.data if tokens is None else replace(config.data, tokens=tokens)
    seq_len, folder = config.train.seq_len, config.save.folder
    together = dist.is_initialized()
    if not together or dist.get_rank() == 0:
        prepare(data, seq_len, folder)
    if together:
        dist.barrier()
    return open_data(data, seq_len, config.train.seed, config.model.vocab_size, folder)


def open_tokens(
    path: Path,
    seq_len: int,
    seed: int,
    vocab_size: int,
    *,
    packing: str = "auto",
    separate: bool = True,
    folder: Path | None = None,
) -> TokenData:
    """Open a token file, or the folder that ``mconv tokenize`` made.

    Args:
        path: of it.
        seq_len: tokens per sample.
        seed: of the order.
        vocab_size: of the model.
        packing, separate: as in ``[data]``.
        folder: where ``prepare`` has put the packing; computed again if it is not there.

    Raises:
        FormatError: damaged files.
        ConfigError: shorter than a sample, ids beyond the vocabulary, nothing to learn.
    """
    file = open_token_file(path)
    if packing == "auto":
        packing = "concat" if file.learned is None or file.starts is None else "first_fit"
    if packing == "concat" and len(file.tokens) <= seq_len:
        raise ConfigError(
            f"{path}: {len(file.tokens)} tokens are less than one sample of {seq_len} + 1"
        )
    if file.largest() >= vocab_size:
        raise ConfigError(f"{path}: token {file.largest()} is beyond model.vocab_size={vocab_size}")
    if file.about.get("learned") == 0:
        raise ConfigError(f"{path}: nothing in it is learned (no message of the assistant?)")
    data = TokenData(file, seq_len, seed, separate)
    if packing == "concat":
        return data
    if file.starts is None:
        raise ConfigError(f"{path}: does not say where documents start; use data.packing 'concat'")
    known = _pack_file(data, folder) if folder else None
    if known is not None and known.is_file():
        return replace(data, packs=np.load(known, mmap_mode="r", allow_pickle=False))
    packs = pack(np.asarray(file.starts), len(file.tokens), seq_len)
    if not len(packs):
        raise ConfigError(f"{path}: no document has two tokens")
    return replace(data, packs=packs)


def prepare(data: DataConfig, seq_len: int, folder: Path) -> None:
    """Do once, on one rank, what all need: encode text and pack documents, into ``folder``."""
    path = token_path(data, folder)
    if path != data.tokens and not path.exists():
        tokenize([data.tokens], path, tokenizer=data.tokenizer, separator=data.separator)
    file = open_tokens(path, seq_len, 0, 1 << 32, packing=data.packing, folder=folder)
    if file.packs is None:
        return
    target = _pack_file(file, folder)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}")
        with part.open("wb") as out:
            np.save(out, file.packs)
        part.replace(target)


def open_data(
    data: DataConfig, seq_len: int, seed: int, vocab_size: int, folder: Path
) -> TokenData:
    """Open what ``prepare`` has made ready."""
    path = token_path(data, folder)
    made = open_token_file(path).about.get("tokenizer_sha256")
    if made and digest(data.tokenizer) not in ("", made):
        raise ConfigError(
            f"{path}: was made with another tokenizer than {data.tokenizer}: what ids mean would "
            "be wrong; tokenize the text again"
        )
    return open_tokens(
        path, seq_len, seed, vocab_size, packing=data.packing, separate=data.separate, folder=folder
    )


def token_path(data: DataConfig, folder: Path) -> Path:
    """Return where the tokens lie: as given, or where text is encoded to in ``folder``."""
    path = data.tokens
    if path.suffix in _TOKEN_FILES or (path / "tokens.npy").is_file() or not path.exists():
        return path
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files += sorted(p for p in data.tokenizer.iterdir() if p.is_file())
    known = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    digest = blake2b(json.dumps([known, data.separator]).encode(), digest_size=6).hexdigest()
    return folder / "data" / f"{path.stem}-{digest}"


def _pack_file(data: TokenData, folder: Path) -> Path:
    return folder / "data" / f"packs-{data.file.fingerprint()[:12]}-{data.seq_len}.npy"
