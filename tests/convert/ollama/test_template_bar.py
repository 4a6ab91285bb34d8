"""The bar over real chat templates: same prompts, sane stop strings, Modelfiles that read back.

The templates lie in the data folder (``templates/*.jinja``); MCONV_TEST_TEMPLATES names further
folders, for instance llama.cpp's ``models/templates``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mconv.convert.ollama.go_writer import go_template
from mconv.convert.ollama.induce import ChatShape, NotInducedError, induce
from mconv.convert.ollama.jinja_chat import JinjaChat, TemplateRefusedError, compile_chat
from mconv.convert.ollama.modelfile import parse
from mconv.convert.ollama.modelfile_values import Modelfile, emit, interpret
from mconv.convert.ollama.proof import prove
from mconv.convert.ollama.stops import stop_strings

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
ANSWER, THOUGHT, TOOL = "Zanswerz", "Zthoughtz", "ztoolz"
CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": TOOL, "arguments": {"a": 1}}}
#: Ways in which templates take an answer that thinks or calls a tool.
RICH: tuple[dict[str, Any], ...] = (
    {"reasoning_content": THOUGHT},
    {"thinking": THOUGHT},
    {"reasoning": THOUGHT},
    {"tool_calls": [CALL]},
    {"reasoning_content": THOUGHT, "tool_calls": [CALL]},
)


@dataclass(frozen=True)
class Result:
    """What became of one template."""

    chat: JinjaChat
    shape: ChatShape | None
    template: str
    missed: str
    stops: tuple[str, ...]


def convert(chat: JinjaChat) -> Result:
    try:
        shape = induce(chat)
        template = go_template(shape)
    except (NotInducedError, ValueError) as error:
        return Result(chat, None, "", str(error) or "no reason", ())
    proof = prove(chat, template)
    missed = "" if proof.ok else next(row.difference for row in proof.rows if not row.same)
    return Result(chat, shape, template, missed, stop_strings(chat, shape, ["</s>"]))


@pytest.fixture(scope="module")
def results(data_dir: Path) -> dict[str, Result]:
    """Every template that renders without tools."""
    more = os.environ.get("MCONV_TEST_TEMPLATES", "").split(os.pathsep)
    out = {}
    for folder in [data_dir / "templates", *map(Path, filter(None, more))]:
        for path in sorted(folder.glob("*.jinja")):
            chat = compile_chat(path.read_text(encoding="utf-8"), TOKENS)
            try:
                chat.render([("user", "x")])
            except TemplateRefusedError:
                continue
            out[path.stem] = convert(chat)
    return out


def test_prompts_are_byte_identical(results: dict[str, Result]) -> None:
    missed = {name: result.missed for name, result in results.items() if result.missed}
    assert len(results) >= 50
    assert (len(results) - len(missed)) / len(results) >= 64 / 66, missed


def test_every_miss_is_named(results: dict[str, Result]) -> None:
    for name, result in results.items():
        assert result.template or result.missed, name


def test_stop_strings_are_no_part_of_answers(results: dict[str, Result]) -> None:
    """Not of the cue, not between its end and the content, not around thoughts and calls."""
    bad = [
        (name, stop)
        for name, result in results.items()
        for stop in result.stops
        if re.search("think|tool|call|channel|message\\||function", stop, re.IGNORECASE)
        or any(stop in text for text in written_by_the_model(result))
    ]
    assert not bad


def written_by_the_model(result: Result) -> list[str]:
    """Parts of prompts that a model itself writes before its answer ends."""
    assert result.shape is not None
    question = [{"role": "user", "content": "q"}]
    start = result.shape.cue
    texts = [start.removeprefix(result.shape.end.strip())]  # a separator of turns may begin a cue
    for extra in ({}, *RICH):
        answer = {"role": "assistant", "content": ANSWER, **extra}
        try:
            text = result.chat.render([*question, answer], generate=False)
        except TemplateRefusedError:
            continue
        at = sorted(text.index(m) for m in (ANSWER, THOUGHT, TOOL) if m in text)
        if start and start in text[: at[0]]:
            begin = text.rindex(start, 0, at[0]) + len(start)
        else:
            begin = at[0]
        texts.append(text[begin : at[-1]])
    return texts


def test_emitted_modelfiles_read_back(results: dict[str, Result]) -> None:
    for result in results.values():
        parameters = {"stop": result.stops} if result.stops else {}
        said = Modelfile(models=("./m.gguf",), template=result.template, parameters=parameters)
        assert interpret(parse(emit(said).encode())) == said
