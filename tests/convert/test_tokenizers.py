"""Tokenizers: real vocabularies field by field, and the rules on small hand-made ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.gguf import open_gguf
from mconv.convert.gguf.values import KeyValue
from mconv.convert.tokenizers import (
    TokenizerFiles,
    TokenizerRule,
    Vocabulary,
    find_tokenizer,
    load_vocabulary,
    vocabulary_entries,
)
from mconv.convert.tokenizers.pre_table import NAMES, STRUCTURES
from mconv.errors import ConfigError, FormatError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parent))
import tiny

BPE = TokenizerRule(("bpe",))
LLAMA = TokenizerRule(("spm", "spm_json", "bpe"), space_prefix=True)
BPE_NAMES = ["deepseek-llm", "gpt-2", "llama-bpe", "qwen2", "starcoder"]


def load(folder: Path, rule: TokenizerRule = BPE, **options: Any) -> Vocabulary:
    return load_vocabulary(TokenizerFiles(folder), rule, **options)


def entries(vocabulary: Vocabulary) -> dict[str, KeyValue]:
    found = vocabulary_entries(vocabulary)
    assert len({e.key for e in found}) == len(found)
    return {e.key.removeprefix("tokenizer.").removeprefix("ggml."): e for e in found}


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write a byte-level tokenizer of a few tokens; ``changes`` replace top-level objects."""
    vocab = {t: i for i, t in enumerate(["a", "b", "ab", "Ġ", "Ġa"])}
    document = {
        "added_tokens": [
            {"id": 5, "content": "<s>", "special": True, "normalized": False},
            {"id": 6, "content": "</s>", "special": True, "normalized": False},
        ],
        "normalizer": None,
        "pre_tokenizer": tiny.pre_tokenizer("qwen2"),
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", "Ġ a"]},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return document


def settings(folder: Path, **values: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", BPE_NAMES)
def test_real_bpe_vocabularies(tmp_path: Path, data_dir: Path, name: str) -> None:
    source = open_gguf(data_dir / "vocab" / f"ggml-vocab-{name}.gguf")
    size = tiny.save_bpe(data_dir / "vocab" / f"ggml-vocab-{name}.gguf", tmp_path)
    found = load(tmp_path, vocab_size=size)
    assert (found.model, found.pre) == ("gpt2", name)
    assert found.tokens == source["tokenizer.ggml.tokens"]
    assert found.types == source["tokenizer.ggml.token_type"].tolist()
    assert found.merges == source["tokenizer.ggml.merges"]
    assert found.chat_template == tiny.TEMPLATE
    for role, key in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
        if tiny.ENDS[name][role == "eos"] is not None:
            assert found.specials.ids[role] == source[f"tokenizer.ggml.{key}"]
    assert found.specials.add.get("bos", False) == (name in ("llama-bpe", "deepseek-llm"))


def test_real_sentencepiece_vocabulary(tmp_path: Path, data_dir: Path) -> None:
    source = open_gguf(data_dir / "vocab" / "ggml-vocab-llama-spm.gguf")
    tiny.save_spm(data_dir / "llama2-tokenizer.model", tmp_path)
    found = load(tmp_path, LLAMA, vocab_size=32000)
    assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", True)
    assert found.tokens == source["tokenizer.ggml.tokens"]
    assert found.types[3:] == source["tokenizer.ggml.token_type"][3:].tolist()
    assert found.types[:3] == [3, 3, 3], "named as special in tokenizer_config.json"
    assert found.scores is not None
    np.testing.assert_array_equal(found.scores[3:], source["tokenizer.ggml.scores"][3:])
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(tmp_path, LLAMA).types == source["tokenizer.ggml.token_type"].tolist()


def test_sentencepiece_from_json_ranks_like_the_model(tmp_path: Path, data_dir: Path) -> None:
    model = data_dir / "llama2-tokenizer.model"
    document = tiny.spm_document(model)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    found = load(tmp_path, LLAMA)
    tiny.save_spm(model, tmp_path / "spm")
    truth = load(tmp_path / "spm", LLAMA)
    assert found.model == "llama" and list(found.tokens) == list(truth.tokens)
    assert found.scores is not None and truth.scores is not None
    merged = {left + right for left, right in document["model"]["merges"]}
    ids = [i for i, token in enumerate(found.tokens) if token in merged]
    order = np.argsort(-found.scores[ids], kind="stable")
    # equal scores mean that the order does not matter; elsewhere it must be the model's
    assert (np.diff(truth.scores[ids][order]) <= 0).all()


def test_added_tokens_of_sentencepiece(tmp_path: Path, data_dir: Path) -> None:
    tiny.save_spm(data_dir / "llama2-tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 32001, "<far>": 40000}))
    old = json.loads((tmp_path / "tokenizer_config.json").read_text())
    old["added_tokens_decoder"]["32002"] = {"content": "▁y", "special": False}
    old["added_tokens_decoder"]["32003"] = {"content": "<|z|>", "special": False}
    settings(tmp_path, **old)
    found = load(tmp_path, LLAMA, vocab_size=32006)
    assert list(found.tokens[32000:]) == [
        "[PAD32000]", "<x>", " y", "<|z|>", "[PAD32004]", "[PAD32005]",
    ]  # fmt: skip
    assert found.types[32000:] == [5, 4, 4, 3, 5, 5]
    assert found.scores is not None
    assert found.scores[32000:].tolist() == [-10000, -1000, -1000, -1000, -10000, -10000]


@pytest.mark.parametrize(
    "regex",
    [
        tiny.REGEXES["qwen2"][0],
        tiny.REGEXES["qwen2"][0].replace("?\\p{L}", "?+\\p{L}"),
        tiny.REGEXES["qwen2"][0].replace("\\r", "\r").replace("\\n", "\n"),
        tiny.REGEXES["qwen2"][0].replace(
            tiny.CUT, "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        ),
    ],
)
@pytest.mark.parametrize("removed", [False, True])
def test_spellings_of_one_structure(tmp_path: Path, regex: str, removed: bool) -> None:
    how = {"behavior": "Removed" if removed else "Isolated", "invert": removed}
    split = {"type": "Split", "pattern": {"Regex": regex}, **how}
    last = {"type": "ByteLevel", "use_regex": False}
    small(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, last]})
    assert load(tmp_path).pre == "qwen2"


def test_a_hundred_added_tokens_change_nothing(tmp_path: Path) -> None:
    extra = [{"id": 5 + i, "content": f"<t{i}>", "special": False} for i in range(100)]
    small(tmp_path, added_tokens=extra)
    found = load(tmp_path, vocab_size=128)
    assert found.pre == "qwen2" and found.types[5:105] == [4] * 100
    assert found.tokens[105] == "[PAD105]" and found.types[105:] == [5] * 23


@pytest.mark.parametrize(
    ("name", "model", "tokens"),
    [
        ("llama-bpe", {"ignore_merges": True}, []),
        ("dbrx", {}, []),
        ("smaug-bpe", {}, ["<|begin_of_text|>"]),
        ("glm4", {"ignore_merges": True}, ["[gMASK]"]),
        ("chatglm-bpe", {}, ["[gMASK]"]),
    ],
)
def test_names_that_share_a_structure(
    tmp_path: Path, name: str, model: dict[str, Any], tokens: list[str]
) -> None:
    document = small(tmp_path, pre_tokenizer=tiny.pre_tokenizer("llama-bpe"))
    added = [{"id": 5 + i, "content": t, "special": True} for i, t in enumerate(tokens)]
    small(
        tmp_path,
        pre_tokenizer=document["pre_tokenizer"],
        model=document["model"] | model,
        added_tokens=added,
    )
    assert load(tmp_path).pre == name


def test_every_name_of_the_table_is_one_of_llamacpp() -> None:
    assert {rule.name for s in STRUCTURES for rule in s.rules} <= set(NAMES.split())
    assert all(s.rules[-1] == type(s.rules[-1])(s.rules[-1].name) for s in STRUCTURES), (
        "the last rule of a structure always applies"
    )


def test_unknown_structure_and_override(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,9}"}, "behavior": "Isolated"}
    small(tmp_path, pre_tokenizer=split)
    with pytest.raises(ConfigError) as error:
        load(tmp_path)
    assert r"\p{N}{1,9}" in str(error.value) and "--pre" in str(error.value)
    assert load(tmp_path, pre="gpt-2").pre == "gpt-2"
    with pytest.raises(ConfigError, match="did you mean 'qwen2'"):
        load(tmp_path, pre="qwen")


def test_both_forms_of_merges(tmp_path: Path) -> None:
    document = small(tmp_path)
    small(tmp_path, model=document["model"] | {"merges": [["a", "b"], [" ", "a"]]})
    assert list(load(tmp_path).merges) == ["a b", "Ġ a"]


def test_vocab_json_and_merges_txt(tmp_path: Path) -> None:
    document = small(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    vocab = document["model"]["vocab"] | {"<|endoftext|>": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n", encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 6}))
    settings(tmp_path, tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")
    found = load(tmp_path, config={"eos_token_id": 5})
    assert found.pre == "gpt-2" and list(found.merges) == ["a b", "Ġ a"]
    assert found.types == [1, 1, 1, 1, 1, 3, 4] and found.specials.ids == {"eos": 5}
    settings(tmp_path, tokenizer_class="OddTokenizer")
    with pytest.raises(ConfigError, match="OddTokenizer"):
        load(tmp_path)


def test_more_tokens_than_the_model(tmp_path: Path) -> None:
    small(tmp_path)
    with pytest.raises(ConfigError, match="ids up to 6, the model has 6"):
        load(tmp_path, vocab_size=6)


def test_added_text_is_stored_as_it_decodes(tmp_path: Path) -> None:
    texts = ["Ġx", "<｜a▁b｜>", "▁c", "plain"]
    added = [
        {"id": 5 + i, "content": t, "special": False, "normalized": False}
        for i, t in enumerate(texts)
    ]
    small(tmp_path, added_tokens=added)
    found = load(tmp_path)
    assert found.tokens[5:] == [" x", "<｜a▁b｜>", " c", "plain"]
    assert found.types[5:] == [4, 3, 4, 4]


def template(*single: str) -> dict[str, Any]:
    items = [
        {"Sequence": {"id": "A"}} if text == "$A" else {"SpecialToken": {"id": text}}
        for text in single
    ]
    return {"type": "TemplateProcessing", "single": items, "pair": []}


@pytest.mark.parametrize(
    ("post", "values", "ids", "add"),
    [
        (None, {}, {}, {}),
        (None, {"bos_token": "<s>", "add_bos_token": True}, {"bos": 5}, {"bos": True}),
        (None, {"bos_token": {"content": "<s>"}}, {"bos": 5}, {}),
        ({"type": "ByteLevel"}, {"add_bos_token": True}, {}, {"bos": False, "eos": False}),
        (template("<s>", "$A"), {"bos_token": "<s>"}, {"bos": 5}, {"bos": True}),
        (template("<s>", "$A"), {}, {"bos": 5, "cls": 5}, {"bos": True}),
        (template("$A", "</s>"), {"eos_token": "</s>"}, {"eos": 6}, {"eos": True}),
        # the template ends with another token than eos: the old one ends a turn
        (
            template("$A", "</s>"),
            {"eos_token": "<s>"},
            {"eos": 6, "eot": 5},
            {"eos": True},
        ),
        ({"type": "RobertaProcessing", "cls": ["<s>", 5], "sep": ["</s>", 6]}, {}, None, None),
    ],
)
def test_special_tokens(
    tmp_path: Path,
    post: object,
    values: dict[str, Any],
    ids: dict[str, int] | None,
    add: dict[str, bool] | None,
) -> None:
    small(tmp_path, post_processor=post)
    settings(tmp_path, **values)
    found = load(tmp_path).specials
    if ids is None:
        assert found.ids == {"sep": 6, "cls": 5}
        assert found.add == {"bos": True, "eos": True, "sep": True}
    else:
        assert found.ids == ids and found.add == add


def test_ids_of_config_json_fill_gaps(tmp_path: Path) -> None:
    small(tmp_path)
    settings(tmp_path, bos_token="<s>")
    config = {"bos_token_id": 1, "eos_token_id": [6, 5], "pad_token_id": -1, "unk_token_id": 2}
    assert load(tmp_path, config=config).specials.ids == {"bos": 5, "unk": 2}
    assert load(tmp_path, config={"text_config": {"eos_token_id": 6}}).specials.ids["eos"] == 6


def test_places_of_chat_templates(tmp_path: Path) -> None:
    small(tmp_path)
    assert load(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load(tmp_path).chat_template == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load(tmp_path).chat_template == "jinja"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    found = entries(load(tmp_path))
    assert found["chat_template"].value == "jinja"
    assert found["chat_template.tool_use"].value == "tools"
    assert list(found["chat_templates"].value) == ["tool_use"]
    settings(tmp_path, chat_template=[{"name": "default", "template": "config"}])
    assert entries(load(tmp_path))["chat_template"].value == "config"
    settings(tmp_path, chat_template=3)
    with pytest.raises(ConfigError, match="chat_template"):
        load(tmp_path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer here"):
        find_tokenizer(tmp_path, ())
    with pytest.raises(ConfigError, match="--tokenizer"):
        find_tokenizer(None, ())
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(FormatError, match="SentencePiece"):
        load(tmp_path, LLAMA)
    (tmp_path / "tokenizer.model").unlink()
    small(tmp_path, model={"type": "WordPiece", "vocab": {}})
    with pytest.raises(UnsupportedError, match="WordPiece"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="JSON"):
        load(tmp_path)
