"""A tokenizer and an embedding of different sizes, brought to one: padded or trimmed.

Training code pads embeddings, fine-tunes add tokens and forget to resize: the rows of the
embedding, ``vocab_size`` and the tokenizer then disagree. Which of them is right only the user can
know, so nothing is fixed unasked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..shardio import Checkpoint, from_array
from ..shardio.tensor import LazyTensor, concat
from .architectures import Architecture
from .tokenizers import TokenizerFiles, Vocabulary, load_vocabulary

FIXES = ("pad", "trim")
_ROWS = ("token_embd", "output")


def fix_sizes(
    ckpt: Checkpoint, architecture: Architecture, tokenizer: Vocabulary, how: str
) -> Checkpoint:
    """Return the checkpoint with as many rows in embedding and head as there will be tokens.

    Args:
        ckpt: with Hugging Face names and a config.
        architecture: its family.
        tokenizer: all its tokens.
        how: ``pad``: the larger of both sizes, rows of zeros for tokens without one; ``trim``: the
            smaller, rows and tokens beyond it are left out.

    Raises:
        ConfigError: another word, or no embedding.
    """
    if how not in FIXES:
        raise ConfigError(f"--vocab-fix is {' or '.join(FIXES)}, not {how!r}")
    names = _embeddings(ckpt, architecture)
    if not names:
        raise ConfigError(f"{ckpt.path}: has no embedding whose size could be fixed")
    rows, tokens = ckpt.weights[names[0]].shape[0], len(tokenizer.tokens)
    size = max(rows, tokens) if how == "pad" else min(rows, tokens)
    fixed = {name: _resized(ckpt.weights[name], size) for name in names}
    assert ckpt.config is not None
    note = f"vocabulary: {rows} rows and {tokens} tokens, brought to {size} of each (--vocab-fix)"
    return replace(
        ckpt,
        weights={**ckpt.weights, **fixed},
        config=_with_size(ckpt.config, size),
        warnings=(*ckpt.warnings, note) if rows != tokens else ckpt.warnings,
    )


def whole_vocabulary(
    files: TokenizerFiles,
    architecture: Architecture,
    config: Mapping[str, Any] | None,
    pre: str | None = None,
) -> Vocabulary:
    """Return all tokens of a tokenizer, whatever the model's size: those added later too.

    Raises:
        MconvError: as ``load_vocabulary``.
    """
    found = load_vocabulary(files, architecture.tokenizer, config, pre=pre)
    added = (files.json("added_tokens.json") or {}).values()
    listed = (files.json("tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    ids = [*added, *(int(n) for n in listed if str(n).isdecimal())]
    size = max([len(found.tokens), *(n + 1 for n in ids if isinstance(n, int))])
    if size == len(found.tokens):
        return found
    return load_vocabulary(files, architecture.tokenizer, config, vocab_size=size, pre=pre)


def trimmed(vocabulary: Vocabulary, size: int) -> Vocabulary:
    """Return the first ``size`` tokens, with the merges and special tokens among them."""
    if len(vocabulary.tokens) <= size:
        return vocabulary
    tokens = [str(text) for text in vocabulary.tokens[:size]]
    known = set(tokens)
    ids = {role: n for role, n in vocabulary.specials.ids.items() if n < size}
    return replace(
        vocabulary,
        tokens=tokens,
        types=list(vocabulary.types[:size]),
        scores=None if vocabulary.scores is None else vocabulary.scores[:size],
        merges=[m for m in vocabulary.merges if {*m.split(" "), m.replace(" ", "")} <= known],
        specials=replace(vocabulary.specials, ids=ids),
    )


def _embeddings(ckpt: Checkpoint, architecture: Architecture) -> list[str]:
    """Return the names of embedding and head, the embedding first."""
    found = []
    for rule in sorted(architecture.tensors, key=lambda rule: rule.outputs[0] != _ROWS[0]):
        if rule.outputs[0] in _ROWS:
            name = f"{rule.hf}.weight"
            bare = name.removeprefix(architecture.prefix)
            found += [n for n in ckpt.weights if n in (name, bare) or n.endswith(f".{name}")]
    return list(dict.fromkeys(found))


def _resized(tensor: LazyTensor, size: int) -> LazyTensor:
    rows = tensor.shape[0]
    if rows >= size:
        return tensor.slice([slice(0, size)])
    zeros = np.zeros((size - rows, *tensor.shape[1:]), tensor.dtype)
    return concat([tensor, from_array(zeros)])


def _with_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    out = {**config, "vocab_size": size}
    if isinstance(config.get("text_config"), Mapping):
        out["text_config"] = {**config["text_config"], "vocab_size": size}
    return out
