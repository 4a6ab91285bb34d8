"""Training a small SentencePiece tokenizer, and turning text into tokens with it.

The tokenizer is a Llama-style one: BPE pieces with byte fallback, ``<unk> <s> </s>`` first, a space
before the text, nothing normalized; so every text survives encoding and decoding. It is saved as
``tokenizer.model`` beside a ``tokenizer_config.json`` that says the same to ``transformers``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from ..errors import ConfigError

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"


def train_tokenizer(documents: Sequence[str], folder: Path, vocab_size: int) -> None:
    """Train on ``documents`` and write the tokenizer's files into ``folder``.

    Args:
        documents: the text.
        folder: created if need be.
        vocab_size: pieces, of which 259 are bytes and control tokens.

    Raises:
        ConfigError: the text is too short for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 24,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text; use fewer ({error})"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "legacy": True,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Open the tokenizer of a folder.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = folder / MODEL
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path}: not a SentencePiece model ({error})") from error


def encode_documents(documents: Sequence[str], folder: Path) -> np.ndarray:
    """Return all documents as one row of ids, each between ``<s>`` and ``</s>``."""
    tokenizer = load_tokenizer(folder)
    rows = tokenizer.encode(list(documents), add_bos=True, add_eos=True)
    return np.concatenate([np.asarray(row, np.int64) for row in rows])
