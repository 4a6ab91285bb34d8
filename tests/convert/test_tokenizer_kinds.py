"""WordPiece, Unigram and tekken vocabularies: the entries of llama.cpp's own converter.

The digests of ``tests/fixtures/tokenizer_digests.json`` were recorded with it.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.tokenizers import (
    TokenizerFiles,
    TokenizerRule,
    Vocabulary,
    load_vocabulary,
    vocabulary_entries,
)
from mconv.convert.tokenizers.spm_proto import BPE, UNIGRAM, SpmSettings, read_settings, write_model
from mconv.errors import ConfigError, FormatError

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))
import tiny_tokenizers
from make_tokenizer_digests import digest

DIGESTS = json.loads((Path(__file__).parent.parent / "fixtures/tokenizer_digests.json").read_text())
UNI = TokenizerRule(("unigram",))


def load(folder: Path, rule: TokenizerRule, **options: Any) -> Vocabulary:
    return load_vocabulary(TokenizerFiles(folder), rule, **options)


@pytest.mark.parametrize("name", tiny_tokenizers.KINDS)
def test_entries_are_the_official_converters(tmp_path: Path, data_dir: Path, name: str) -> None:
    save, rule = tiny_tokenizers.KINDS[name]
    save(tmp_path, data_dir)
    config = json.loads((tmp_path / "config.json").read_text())
    found = load(tmp_path, rule, config=config, vocab_size=config["vocab_size"])
    assert digest(vocabulary_entries(found)) == DIGESTS[name]


def test_wordpiece_case_and_padding(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nwalk\n##ing\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    tiny_tokenizers.write(tmp_path / "tokenizer_config.json", settings)
    found = load(tmp_path, TokenizerRule(("wordpiece",)), vocab_size=5, pre="other")
    assert found.tokens == ["[PAD]", "[UNK]", "▁walk", "ing", "▁[PAD4]"]
    assert found.types == [3, 3, 1, 1, 5] and found.pre == "other"
    assert found.specials.lowercase is False and found.token_types is None


def unigram_document(**changes: Any) -> dict[str, Any]:
    charsmap = base64.b64encode(b"rules").decode()
    return {
        "added_tokens": [
            tiny_tokenizers.added(0, "<pad>"),
            tiny_tokenizers.added(1, "<x>", special=False),
            tiny_tokenizers.added(6, "<extra>"),
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": charsmap},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"},
        "model": {
            "type": "Unigram", "unk_id": 2,
            "vocab": [["<pad>", 0], ["<x>", 0], ["<unk>", 0], ["▁a", -1.5], ["<0x0A>", -2]],
        },
        **changes,
    }  # fmt: skip


def test_unigram_of_tokenizer_json(tmp_path: Path) -> None:
    tiny_tokenizers.write(tmp_path / "tokenizer.json", unigram_document())
    found = load(tmp_path, UNI, vocab_size=8)
    tokens = ["<pad>", "<x>", "<unk>", "▁a", "<0x0A>", "[PAD5]", "<extra>", "[PAD7]"]
    assert found.tokens == tokens and found.types == [3, 4, 2, 1, 6, 5, 3, 5]
    assert found.scores is not None
    np.testing.assert_array_equal(found.scores, [0, 0, 0, -1.5, -2, -10000, -1000, -10000])
    assert (found.add_space_prefix, found.remove_spaces, found.charsmap) == (False, True, b"rules")
    assert len(load(tmp_path, UNI).tokens) == 7
    with pytest.raises(ConfigError, match="--vocab-fix"):
        load(tmp_path, UNI, vocab_size=4)


@pytest.mark.parametrize(
    "bad",
    [
        {"model": {"type": "Unigram", "vocab": [["a"]]}},
        {"model": {"type": "Unigram", "vocab": 3}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "a"}},
    ],
)
def test_damaged_unigram(tmp_path: Path, bad: dict[str, Any]) -> None:
    tiny_tokenizers.write(tmp_path / "tokenizer.json", unigram_document(**bad))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load(tmp_path, UNI)


def test_tekken_with_listed_specials(tmp_path: Path, data_dir: Path) -> None:
    tiny_tokenizers.save_tekken(tmp_path, data_dir)
    document = json.loads((tmp_path / "tekken.json").read_text())
    document["config"]["version"] = "v11"
    document["special_tokens"] = [
        {"rank": n, "token_str": t, "is_control": True}
        for n, t in enumerate(("<unk>", "<s>", "</s>"))
    ]
    tiny_tokenizers.write(tmp_path / "tekken.json", document)
    rule = TokenizerRule(("tekken",))
    found = load(tmp_path, rule, vocab_size=1030)
    assert list(found.tokens[:4]) == ["<unk>", "<s>", "</s>", "<SPECIAL_3>"]
    assert found.specials.ids["pad"] == 2 and found.chat_template is None
    with pytest.raises(ConfigError, match="1030 tokens, the model has 1000"):
        load(tmp_path, rule, vocab_size=1000)
    for key, value in (("vocab", document["vocab"][:300]), ("config", {}), ("vocab", [3])):
        tiny_tokenizers.write(tmp_path / "tekken.json", {**document, key: value})
        with pytest.raises(ConfigError, match="tekken"):
            load(tmp_path, rule)


def test_sentencepiece_files_are_written_as_they_are_read(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    path = tmp_path / "m.model"
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("▁a", -1.25, 1), ("<0x0A>", -3.0, 6)]
    pieces += [(f"<0x{n:02X}>", 0.0, 6) for n in range(256) if n != 10]
    path.write_bytes(
        write_model(pieces, SpmSettings(BPE, remove_spaces=False), {"unk": 0, "bos": 1})
    )
    model = SentencePieceProcessor(model_file=str(path))
    assert [model.IdToPiece(n) for n in range(4)] == ["<unk>", "<s>", "▁a", "<0x0A>"]
    assert model.GetScore(2) == -1.25 and model.IsByte(3) and model.bos_id() == 1
    assert model.eos_id() == -1 and model.encode("a") == [2]
    for settings in (SpmSettings(BPE, False, False), SpmSettings(UNIGRAM, charsmap=b"\0rules\xff")):
        path.write_bytes(write_model(pieces, settings, {"unk": 0}))
        assert read_settings(path) == settings


@pytest.mark.parametrize("raw", [b"\x12\xff", b"\x12\x05ab", b"\x0b", b"\xff" * 20, b"\x10\x80"])
def test_damaged_sentencepiece_files(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "m.model"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"m\.model"):
        read_settings(path)
