"""Training a small tokenizer: SentencePiece (Llama's kind) or byte-level BPE (GPT-2's kind).

Both keep every text: SentencePiece with byte fallback and nothing normalized, ``<unk> <s> </s>``
first; byte-level BPE by construction, ``<|endoftext|>`` around documents. The files say the same to
``transformers`` and to llama.cpp.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from ...errors import ConfigError
from .tokenizer import CONFIG, FAST, MODEL

_END = "<|endoftext|>"
_LEAST = {"sentencepiece": 259, "bpe": 257}


def train_tokenizer(
    documents: Iterable[str], folder: Path, vocab_size: int, kind: str = "sentencepiece"
) -> None:
    """Train on ``documents`` and write the tokenizer's files into ``folder``.

    Args:
        documents: the text.
        folder: created if need be.
        vocab_size: tokens, bytes and special ones included.
        kind: ``sentencepiece`` or ``bpe``.

    Raises:
        ConfigError: too few tokens for all bytes, or the text is too short for so many.
    """
    if vocab_size <= _LEAST[kind]:
        raise ConfigError(
            f"a {kind} tokenizer needs more than {_LEAST[kind]} tokens (bytes and special ones), "
            f"not {vocab_size}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    made = _pieces if kind == "sentencepiece" else _bytes
    settings = made(documents, folder, vocab_size)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _pieces(documents: Iterable[str], folder: Path, vocab_size: int) -> dict[str, Any]:
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
        if "required_chars" in str(error):
            raise ConfigError(
                f"{vocab_size} tokens do not hold all characters of this text; use more ({error})"
            ) from error
        raise _too_many(vocab_size, error) from error
    (folder / MODEL).write_bytes(model.getvalue())
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "legacy": True,
    }


def _bytes(documents: Iterable[str], folder: Path, vocab_size: int) -> dict[str, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(documents), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise _too_many(vocab_size, f"it gives {tokenizer.get_vocab_size()}")
    tokenizer.save(str(folder / FAST))
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": _END,
        "eos_token": _END,
        "unk_token": _END,
    }


def _too_many(vocab_size: int, why: object) -> ConfigError:
    return ConfigError(
        f"no tokenizer of {vocab_size} tokens can be trained on this text; use fewer ({why})"
    )
