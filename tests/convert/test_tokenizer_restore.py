"""Vocabularies of GGUF back into tokenizer files: real ones entry by entry, and the rules by hand.

The files made of a real vocabulary encode the test strings as the original tokenizer did.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.gguf import KeyValue, open_gguf
from mconv.convert.gguf.values import string
from mconv.convert.gguf.writer import pack_entry
from mconv.convert.tokenizers import (
    Specials,
    TokenizerFiles,
    TokenizerRule,
    Vocabulary,
    load_vocabulary,
    vocabulary_entries,
)
from mconv.convert.tokenizers.pre_table import STRUCTURES
from mconv.convert.tokenizers.restore import TokenizerFolder, restore_tokenizer
from mconv.convert.tokenizers.restore_ranked import ranked_merges
from mconv.convert.tokenizers.stored import stored_vocabulary
from mconv.errors import FormatError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parent))
import tiny

RULE = TokenizerRule(("spm", "bpe"), space_prefix=True)
NAMES = ["deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder"]


def written(folder: Path, made: TokenizerFolder) -> TokenizerFiles:
    for name, data in made.files.items():
        (folder / name).write_bytes(data)
    return TokenizerFiles(folder)


def again(folder: Path, vocabulary: Vocabulary) -> Vocabulary:
    """Restore a vocabulary and read it."""
    made = restore_tokenizer(vocabulary)
    config = {f"{role}_token_id": index for role, index in made.ids.items()}
    size = len(vocabulary.tokens)
    return load_vocabulary(written(folder, made), RULE, config, vocab_size=size)


def packed(entries: list[KeyValue] | Mapping[str, KeyValue]) -> dict[str, bytes]:
    found = entries.values() if isinstance(entries, Mapping) else entries
    return {e.key: b"".join(pack_entry(e)) for e in found if e.key.startswith("tokenizer.")}


@pytest.mark.parametrize("name", NAMES)
def test_real_vocabularies(tmp_path: Path, data_dir: Path, name: str) -> None:
    from tokenizers import Tokenizer

    path = data_dir / "vocab" / f"ggml-vocab-{name}.gguf"
    source = open_gguf(path)
    before, after = packed(source.entries), packed(
        vocabulary_entries(again(tmp_path, stored_vocabulary(source.entries, path)))
    )  # fmt: skip
    # an old converter called the padding of Phi-3's vocabulary unknown, with the same scores
    known = {"tokenizer.ggml.token_type", "tokenizer.ggml.scores"} if name == "phi-3" else set()
    assert {
        key for key in before.keys() | after.keys() if before.get(key) != after.get(key)
    } <= known
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tests = tiny.vectors(path)
    assert len(tests) >= 46
    for text, ids in tests:
        assert library.encode(text, add_special_tokens=False).ids == ids, text


def small(**changes: Any) -> Vocabulary:
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": ["a", "b", "ab", "Ġ", "Ġa", "<s>", "</s>", "<x>"],
        "types": [1, 1, 1, 1, 1, 3, 3, 4],
        "merges": ["a b", "Ġ a"],
        **changes,
    }
    return Vocabulary(**values)


@pytest.mark.parametrize(
    ("ids", "add"),
    [
        ({}, {}),
        ({}, {"bos": True, "eos": False}),
        ({"bos": 5}, {"bos": True}),
        ({"bos": 5, "eos": 6}, {"bos": True, "eos": False}),
        ({"bos": 5, "eos": 6}, {"bos": True, "eos": True}),
        ({"bos": 5, "eos": 6}, {"bos": False, "eos": False}),
        ({"bos": 5, "eos": 6}, {"bos": False}),
        ({"eos": 6}, {"eos": True}),
        ({"eos": 6, "bos": 5, "pad": 6}, {}),
        ({"bos": 5, "eos": 6, "unk": 5, "pad": 0}, {"bos": True, "eos": False, "sep": False}),
        ({"bos": 5, "eos": 6, "eot": 5}, {"bos": True, "eos": True}),
    ],
)
def test_ids_and_flags_in_their_order(
    tmp_path: Path, ids: dict[str, int], add: dict[str, bool]
) -> None:
    found = again(tmp_path, small(specials=Specials(ids, add))).specials
    assert list(found.ids.items()) == list(ids.items())
    assert list(found.add.items()) == list(add.items())


@pytest.mark.parametrize(
    "template", [None, "{{ messages }}", (("default", "a"), ("tool_use", "b"))]
)
def test_templates(tmp_path: Path, template: Any) -> None:
    assert again(tmp_path, small(chat_template=template)).chat_template == template


def test_ids_with_gaps(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokens = ["a", "[PAD1]", "ab", "Ġ", "b", "<s>", "[PAD6]", "Ġx", " y", "[PAD9]"]
    types = [1, 5, 1, 1, 1, 3, 5, 3, 4, 5]
    found = again(tmp_path, small(tokens=tokens, types=types, merges=["a b"]))
    assert list(found.tokens) == tokens and found.types == types
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for index in (0, 2, 5, 8):
        assert library.token_to_id(tokens[index]) == index


@pytest.mark.parametrize("name", [r.name for s in STRUCTURES for r in s.rules if not r.tokens])
def test_pre_tokenizers_are_found_again(tmp_path: Path, name: str) -> None:
    if name in ("chameleon", "kimi-k2"):
        with pytest.raises(UnsupportedError, match="--tokenizer"):
            again(tmp_path, small(pre=name))
    elif name == "roberta-bpe":  # known by a post-processor that says other things too
        assert again(tmp_path, small(pre=name)).pre == "gpt-2"
    else:
        assert again(tmp_path, small(pre=name)).pre == name


def sentencepiece(**changes: Any) -> Vocabulary:
    tokens = ["<unk>", "<s>", "</s>", "y", "▁", "a", "▁a", "<pad>", "[PAD8]", "<|x|>", " y"]
    values: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": [*tokens, "[PAD11]"],
        "types": [2, 3, 3, 1, 1, 1, 1, 3, 5, 3, 4, 5],
        "scores": np.array([0, 0, 0, -4, -2, -3, -1, 0, -1e4, -1e3, -1e3, -1e4], np.float32),
        "specials": Specials({"bos": 1, "eos": 2, "unk": 0, "pad": 7}, {"bos": True, "eos": False}),
        **changes,
    }
    return Vocabulary(**values)


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece(tmp_path: Path, prefix: bool | None) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    vocabulary = sentencepiece(add_space_prefix=prefix)
    assert packed(vocabulary_entries(again(tmp_path, vocabulary))) == packed(
        vocabulary_entries(vocabulary)
    )
    model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a", " a", "aa a", "y ay"):
        ids = library.encode(text, add_special_tokens=False).ids
        assert ids == model.encode(text), text
    assert model.encode("a") == ([6] if prefix is not False else [5])
    assert library.encode("a").ids[0] == 1


@pytest.mark.parametrize("ids", [{}, {"bos": 1}, {"eos": 2}])
@pytest.mark.parametrize("add", [{"bos": True, "eos": False}, {"bos": True, "eos": True}, {}])
def test_flags_without_ids(tmp_path: Path, ids: dict[str, int], add: dict[str, bool]) -> None:
    found = again(tmp_path, sentencepiece(specials=Specials(ids, add))).specials
    assert (found.ids, found.add) == (ids, add)


def test_tokens_that_sentencepiece_does_not_know_as_special(tmp_path: Path) -> None:
    vocabulary = sentencepiece(specials=Specials({}, {}))
    assert again(tmp_path, vocabulary).types == vocabulary.types
    none = sentencepiece(types=[1, 3, 3, 1, 1, 1, 1, 3, 5, 3, 4, 5], specials=Specials({}, {}))
    assert again(tmp_path, none).types[0] == 2, "SentencePiece must have an unknown piece"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'bert'"):
        restore_tokenizer(small(model="bert"))
    with pytest.raises(UnsupportedError, match="'odd'"):
        restore_tokenizer(small(pre="odd"))
    with pytest.raises(FormatError, match="UTF-8"):
        restore_tokenizer(small(tokens=[*small().tokens[:-1], "\udcff"]))
    with pytest.raises(FormatError, match="token 0 is not UTF-8"):
        restore_tokenizer(sentencepiece(tokens=["\udcff", *sentencepiece().tokens[1:]]))
    with pytest.raises(FormatError, match="no vocabulary"):
        stored_vocabulary({}, "x.gguf")
    entries = {e.key: e for e in vocabulary_entries(small(specials=Specials({"bos": 99})))}
    with pytest.raises(FormatError, match="99"):
        stored_vocabulary(entries, "x.gguf")
    entries = {e.key: e for e in vocabulary_entries(small(types=[1, 1]))}
    with pytest.raises(FormatError, match="8 tokens and 2 types"):
        stored_vocabulary(entries, "x.gguf")
    entries = {"tokenizer.ggml.tokens": string("tokenizer.ggml.tokens", "text")}
    with pytest.raises(FormatError, match="no vocabulary"):
        stored_vocabulary(entries, "x.gguf")


def test_settings_are_json(tmp_path: Path) -> None:
    made = restore_tokenizer(small(chat_template="t"), max_length=77)
    settings = json.loads(made.files["tokenizer_config.json"])
    assert settings["model_max_length"] == 77 and settings["chat_template"] == "t"


def test_a_model_that_came_as_json_alone(tmp_path: Path, data_dir: Path) -> None:
    """Tokens of a user's inside the model have no score then: ``tokenizer.model`` cannot say so."""
    from tokenizers import Tokenizer

    document = tiny.spm_document(data_dir / "llama2-tokenizer.model")
    texts = {n: text for text, n in document["model"]["vocab"].items()}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for n in (31999, 29000):  # a letter, and a word that is merged from others
        document["added_tokens"].append({"id": n, "content": texts[n], "special": False, **plain})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    rule = TokenizerRule(("spm", "spm_json"))
    found = load_vocabulary(TokenizerFiles(tmp_path / "a"), rule)
    assert found.types[31999] == found.types[29000] == 4
    (tmp_path / "b").mkdir()
    files = written(tmp_path / "b", restore_tokenizer(found))
    assert files.path("tokenizer.model") is None
    assert packed(vocabulary_entries(load_vocabulary(files, rule))) == packed(
        vocabulary_entries(found)
    )
    before, after = (Tokenizer.from_file(str(tmp_path / x / "tokenizer.json")) for x in "ab")
    for text, ids in tiny.vectors(data_dir / "vocab" / "ggml-vocab-llama-spm.gguf"):
        assert after.encode(text, add_special_tokens=False).ids == ids
        assert before.encode(text, add_special_tokens=False).ids == ids


@pytest.mark.parametrize("scores", [[-1.0, -2.0, -3.0], [-1.5, -9.0, 0.0], [-4.0, -4.0, -0.0]])
def test_scores_that_are_no_ranks(scores: list[float]) -> None:
    pieces = [(t, s, 1) for t, s in zip(("a", "b", "ab"), scores, strict=True)]
    assert ranked_merges(pieces) is None
