"""Chat templates become Go templates with the same prompts, and stop strings that stop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mconv.convert.ollama.go_writer import go_template, without_bos
from mconv.convert.ollama.induce import NotInducedError, induce
from mconv.convert.ollama.jinja_chat import JinjaChat, TemplateRefusedError, compile_chat
from mconv.convert.ollama.proof import prove
from mconv.convert.ollama.stops import stop_strings

sys.path.insert(0, str(Path(__file__).parent))
import chats

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def compiled(source: str) -> JinjaChat:
    return compile_chat(source, TOKENS)


@pytest.mark.parametrize("name", chats.ALL)
def test_the_prompts_are_the_same(name: str) -> None:
    chat = compiled(chats.ALL[name])
    proof = prove(chat, go_template(induce(chat)))
    assert proof.ok, [(row.name, row.difference) for row in proof.rows if not row.same]
    assert proof.compared == (5 if name == "no system" else 10)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("chatml", ("<|im_end|>",)),
        ("late system", ("</s>",)),
        ("no system", ("<end_of_turn>",)),
        ("thinking", ("<|im_end|>",)),
        ("channels", ("<|return|>",)),
        ("words", ("\n\nUser:",)),
        ("parts", ("<|e|>",)),
    ],
)
def test_stop_strings(name: str, stops: tuple[str, ...]) -> None:
    chat = compiled(chats.ALL[name])
    assert stop_strings(chat, induce(chat)) == stops


def test_stop_strings_of_the_tokenizer() -> None:
    chat = compiled(chats.CHATML)
    eog = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "</think>", "<tool_call>", ""]
    assert stop_strings(chat, induce(chat), eog) == ("<|im_end|>", "<|endoftext|>")


def test_known_special_tokens_need_not_look_special() -> None:
    chat = compiled(chats.CHATML.replace("<|im_end|>", "~END~"))
    assert stop_strings(chat, induce(chat), specials={"~END~", "<|im_start|>"}) == ("~END~",)


def test_a_first_token_that_the_tokenizer_adds_is_left_out() -> None:
    chat = compiled(chats.SYSTEM_IN_LAST_USER)
    template = go_template(without_bos(induce(chat), "<s>"))
    assert "<s>" not in template
    assert prove(chat, template, bos="<s>").ok
    assert not prove(chat, template).ok


def test_differences_are_told() -> None:
    proof = prove(compiled(chats.CHATML), "{{ range .Messages }}{{ .Content }}{{ end }}")
    assert not proof.ok
    assert "the model's template says '<|im_start|>user" in proof.rows[0].difference


def test_limits_are_told() -> None:
    limits = " ".join(prove(compiled(chats.NO_SYSTEM), "x").limits)
    assert "trims white space around user messages" in limits
    assert "refuses system messages" in limits
    assert "<think> blocks" in " ".join(prove(compiled(chats.THINKING), "x").limits)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "varies|changes"),
        ("{{ functions.x }}", "is undefined"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "reorders"),
        (chats.CHATML + "{{ messages | length }}", "varies"),
    ],
)
def test_what_is_no_constant_format(source: str, why: str) -> None:
    with pytest.raises(NotInducedError, match=why):
        induce(compiled(source))


def test_date_formats_that_go_cannot_write_are_known() -> None:
    shape = induce(compiled("{{ strftime_now('%A %H:%M') }}" + chats.CHATML))
    assert shape.dates.inexpressible() == ("%A %H:%M",)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% for m in messages %}{{ m.update({'a': 1}) }}{% endfor %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 2000000 }}{{ messages }}",
    ],
)
def test_hostile_templates_are_refused(source: str) -> None:
    with pytest.raises(TemplateRefusedError):
        compiled(source).render([("user", "x")])


def test_jinja_as_transformers_has_it() -> None:
    chat = compiled(
        "{%- generation %}a{% endgeneration %}\n    {%- for i in [1,2,3] %}{% if i == 2 %}"
        "{% break %}{% endif %}{{ i }}{% endfor %}{{ {'ü': '<'} | tojson }}"
    )
    assert chat.render([("user", "x")]) == 'a1{"ü": "<"}'
