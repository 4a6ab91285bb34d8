"""Text files become token files, and small tokenizers are trained."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from mconv.cli import cli
from mconv.errors import ConfigError, FormatError, OutputError
from mconv.trainer.delivery.demo import documents
from mconv.trainer.text.documents import Chat, Completion, read_records, text_files
from mconv.trainer.text.token_file import open_token_file
from mconv.trainer.text.tokenize import tokenize
from mconv.trainer.text.tokenizer import encode_documents, load_tokenizer
from mconv.trainer.text.train_tokenizer import train_tokenizer

ODD = "  two  blanks\nand a line, Zürich 12 \N{SNOWMAN}"


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_tokenizers_lose_nothing_and_are_reproducible(tmp_path: Path, kind: str) -> None:
    texts = documents()
    for name in "ab":
        train_tokenizer(iter(texts), tmp_path / name, 400, kind)
    first, second = (sorted((tmp_path / n).iterdir()) for n in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.vocab_size == 400
    expected = (1, 2, True) if kind == "sentencepiece" else (0, 0, False)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == expected
    for text in [*texts, ODD]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids, starts = tokenizer.marked(text)
        assert ids == tokenizer.encode(text)
        assert starts == sorted(starts)
    ids = encode_documents(texts, tmp_path / "a")
    assert (ids == expected[1]).sum() == len(texts)
    with pytest.raises(ConfigError, match="use fewer"):
        train_tokenizer(texts[:1], tmp_path / "c", 5000, kind)
    with pytest.raises(ConfigError, match="needs more than"):
        train_tokenizer(texts[:1], tmp_path / "c", 100, kind)
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_transformers_reads_the_same_tokens(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    train_tokenizer(documents(), tmp_path, 400, kind)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in documents() if kind == "sentencepiece" else [*documents(), ODD]:
        assert reference(text)["input_ids"] == tokenizer.encode(text, add_bos=True)
    assert (reference.bos_token_id, reference.eos_token_id) == (tokenizer.bos, tokenizer.eos)


def test_records_of_every_kind(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"text": "plain"},
        {"messages": messages},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": messages[:1], "completion": messages[1:]},
        {"prompt": "a", "completion": "b"},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt").write_text("one\n\ntwo\n\n \n\n")
    (tmp_path / "ignored.md").write_text("no")
    plain, zipped, lines = text_files([tmp_path])
    conversation = Chat(tuple(messages))
    expected = ["plain", conversation, conversation, Chat(tuple(messages), 1), Completion("a", "b")]
    assert list(read_records(plain)) == list(read_records(zipped)) == expected
    assert list(read_records(lines, "\n\n")) == ["one", "two"]
    assert list(read_records(lines)) == ["one\n\ntwo\n\n \n\n"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"a.jsonl:2: not JSON"),
        ('{"question": 1}', r"a.jsonl:2: has question; expected text, messages"),
        ('{"messages": [{"content": "a"}]}', "a message needs a role"),
        ('{"messages": []}', "without messages"),
        ("[1]", "expected an object, found list"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(FormatError, match=said):
        list(read_records(path))


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="is not there"):
        text_files([tmp_path / "b.txt"])
    with pytest.raises(ConfigError, match="cannot be read as text"):
        text_files([tmp_path / "a.md"])
    with pytest.raises(FormatError, match="cannot be read as UTF-8"):
        list(read_records(tmp_path / "latin.txt"))


def test_the_command(tmp_path: Path) -> None:
    source, out = tmp_path / "text.txt", tmp_path / "tokens"
    source.write_text("\n\n".join(documents()))
    command = [
        "tokenize",
        str(source),
        "-o",
        str(out),
        "--train-vocab",
        "330",
        "--separator",
        r"\n\n",
    ]
    run = CliRunner().invoke(cli, [*command, "--dry-run", "--json"], catch_exceptions=False)
    assert json.loads(run.stdout)["dry_run"]
    assert not out.exists()
    run = CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False)
    said = json.loads(run.stdout)
    assert said["documents"] == len(documents())
    assert (said["vocab_size"], said["bos"], said["eos"], said["trained"]) == (330, 1, 2, True)
    file = open_token_file(out)
    expected = encode_documents([t + "" for t in documents()], out / "tokenizer")
    assert file.tokens.tolist() == expected.tolist()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    again = ["tokenize", str(source), "-o", str(out), "--tokenizer", str(out / "tokenizer")]
    run = CliRunner().invoke(cli, again)
    assert "replace it with --force" in str(run.exception)
    run = CliRunner().invoke(cli, [*command, "--force"], catch_exceptions=False)
    assert "330 tokens" in run.stdout


def test_nothing_is_left_when_an_input_is_damaged(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "fine"}\n{')
    train_tokenizer(documents(), tmp_path / "tok", 330)
    with pytest.raises(FormatError, match="not JSON"):
        tokenize([source], tmp_path / "out", tokenizer=tmp_path / "tok")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "tok"]
    with pytest.raises(ConfigError, match="either"):
        tokenize([source], tmp_path / "out")
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="was not made by this command"):
        tokenize([source], tmp_path / "mine", tokenizer=tmp_path / "tok", force=True)
