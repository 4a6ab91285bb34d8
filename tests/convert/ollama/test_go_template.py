"""The Go template evaluator against recorded answers of Go's own engine."""

from __future__ import annotations

import copy
import datetime
import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from mconv.convert.ollama.go_template import Struct, parse_template
from mconv.errors import FormatError

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
