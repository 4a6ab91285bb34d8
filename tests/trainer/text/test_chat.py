"""Conversations: what is learned is exactly what the assistant writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from mconv.convert.ollama.jinja_chat import compile_chat
from mconv.errors import ConfigError, FormatError
from mconv.trainer.text.chat import _MARKS, _TAG, ChatEncoder, chat_encoder
from mconv.trainer.text.documents import Chat, Completion
from mconv.trainer.text.tokenizer import load_tokenizer
from mconv.trainer.text.train_tokenizer import train_tokenizer

CHATML = """\
{% for m in messages %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TAGGED = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
[A] {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{% else %}
[Q] {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A] {% endif %}"""
THINKING = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>{% endif %}"""
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
TEXT = ["lamps and ships, and a keeper who wrote: yes or no?", "user assistant [INST] <|im_end|>"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(TEXT * 3, folder / "bpe", 280, "bpe")
    path = folder / "bpe" / "tokenizer.json"
    document = json.loads(path.read_text())
    for text in ("<|im_start|>", "<|im_end|>"):
        token = {**document["added_tokens"][0], "content": text}
        document["added_tokens"].append({**token, "id": 280 + len(document["added_tokens"]) - 1})
    path.write_text(json.dumps(document))
    train_tokenizer(TEXT * 3, folder / "sentencepiece", 290)
    return {"bpe": folder / "bpe", "sentencepiece": folder / "sentencepiece"}


def encoder(folder: Path, template: str) -> ChatEncoder:
    (folder / "chat_template.jinja").write_text(template)
    return chat_encoder(load_tokenizer(folder))


def chat(*said: str, given: int = 0) -> Chat:
    roles = ("user", "assistant")
    return Chat(
        tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(said)), given
    )


def learned(made: ChatEncoder, ids: Any, marks: Any) -> list[str]:
    """The runs of learned tokens, as text with special tokens."""
    names = {i: name for name, i in made.tokenizer.special.items()}
    runs: list[str] = []
    open_ = False
    for token, mark in zip(ids.tolist(), marks.tolist(), strict=True):
        if mark:
            text = names.get(token) or made.tokenizer.decode([token])
            runs = [*runs[:-1], runs[-1] + text] if open_ else [*runs, text]
        open_ = bool(mark)
    return runs


Words = st.text("lamps hi,pwonkeyr?", min_size=1, max_size=12).filter(lambda t: t.strip() == t)


@given(said=st.lists(Words, min_size=2, max_size=6), given_=st.integers(0, 2))
def test_exactly_what_the_assistant_says(
    tokenizers: dict[str, Path], said: list[str], given_: int
) -> None:
    made = encoder(tokenizers["bpe"], CHATML)
    [(ids, marks)] = made.conversation(chat(*said, given=given_), "here")
    answers = [text + "<|im_end|>" for i, text in enumerate(said) if i % 2 and i >= given_]
    assert learned(made, ids, marks) == answers
    assert made.tokenizer.decode(ids.tolist()).count("assistant") >= len(said) // 2


@pytest.mark.parametrize(
    ("kind", "template", "expected"),
    [
        ("bpe", CHATML, [["yes<|im_end|>", "no<|im_end|>"]]),
        ("bpe", TAGGED, [["yes<|endoftext|>", "no<|endoftext|>"]]),
        ("bpe", THINKING, [["<think></think>yes<|im_end|>"], ["<think></think>no<|im_end|>"]]),
        ("sentencepiece", LLAMA2, [["yes</s>", "no</s>"]]),
    ],
)
def test_templates(
    tokenizers: dict[str, Path], kind: str, template: str, expected: list[list[str]]
) -> None:
    made = encoder(tokenizers[kind], template)
    found = made.conversation(chat("lamps?", "yes", "ships?", "no"), "here")
    said = [[t.replace(" ", "") for t in learned(made, *one)] for one in found]
    if template is THINKING:  # the thought that the prompt opens is not to be written again
        expected = [[t.replace("<think>", "") for t in one] for one in expected]
    assert said == expected
    [tail] = made.conversation(chat("lamps?", "yes", "ships?", "no", given=2), "here")
    assert [t.replace(" ", "") for t in learned(made, *tail)] == expected[-1][-1:]


def test_templates_get_the_tools(tokenizers: dict[str, Path]) -> None:
    template = "{% for t in tools %}{{ t.name }} {% endfor %}" + CHATML
    made = encoder(tokenizers["bpe"], template)
    said = chat("lamps?", "yes")
    [(text, spans)] = made.rendered(replace(said, tools=({"name": "look"},)))
    assert text.startswith("look ")
    assert [text[a:b] for a, b in spans] == ["yes<|im_end|>\n"]
    assert made.rendered(said)[0][0] == text.removeprefix("look ")


def test_tokens_are_those_of_the_text(tokenizers: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    made = encoder(tokenizers["bpe"], CHATML)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizers["bpe"] / "tokenizer.json")
    )
    messages = chat("lamps and ships", "yes, a keeper")
    expected = reference.apply_chat_template(
        list(messages.messages), chat_template=CHATML, return_dict=False
    )
    assert made.conversation(messages, "here")[0][0].tolist() == expected


def test_completions(tokenizers: dict[str, Path]) -> None:
    for kind, around in (("bpe", ("", "<|endoftext|>")), ("sentencepiece", ("<s>", "</s>"))):
        made = chat_encoder(load_tokenizer(tokenizers[kind]))
        [(ids, marks)] = made.completion(Completion("lamps? ", "yes"))
        assert [t.strip() for t in learned(made, ids, marks)] == ["yes" + around[1]]
        names = {i: name for name, i in made.tokenizer.special.items()}
        assert names.get(int(ids[0]), "") == around[0]


def test_refusals(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    made = encoder(tokenizers["bpe"], "{{ raise_exception('only users') }}")
    with pytest.raises(FormatError, match=r"here: .*only users"):
        made.conversation(chat("a", "b"), "here")
    (tokenizers["bpe"] / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        chat_encoder(load_tokenizer(tokenizers["bpe"])).conversation(chat("a", "b"), "here")
    made = encoder(tokenizers["bpe"], "{{ messages | length }} messages")
    with pytest.raises(FormatError, match="does not follow"):
        made.conversation(chat("a", "b"), "here")


def test_templates_of_real_models(data_dir: Path) -> None:
    class Nothing:
        folder = data_dir

    said = chat("QuestionOne", "AnswerOne", "QuestionTwo", "AnswerTwo")
    refused, names = [], {"bos_token": "<s>", "eos_token": "</s>"}
    for path in sorted((data_dir / "templates").glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        tagged = _TAG.search(source) is not None
        template = compile_chat(source, names, _MARKS if tagged else None)
        try:
            found = ChatEncoder(Nothing(), template, tagged).rendered(said)  # type: ignore[arg-type]
        except Exception as error:
            refused.append(f"{path.stem}: {error}")
            continue
        spans = [text[a:b] for text, places in found for a, b in places]
        assert ["One" in s for s in spans] == [True, False], path.name
        assert all("Answer" in s and "Question" not in s for s in spans), path.name
    assert len(refused) == 3, refused  # two that always end with a prompt, one without functions
