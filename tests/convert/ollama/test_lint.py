"""Lint and explain: what Ollama makes of a GGUF file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.gguf import KeyValue, ValueType, open_gguf
from mconv.convert.ollama.build import Wishes, make_modelfile
from mconv.convert.ollama.explain import explain
from mconv.convert.ollama.facts import ModelFacts, facts_of
from mconv.convert.ollama.lint import _tensors, _types, lint
from mconv.convert.to_gguf import to_gguf

sys.path.insert(0, str(Path(__file__).parent))
import chats
import models


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.chat_gguf(tmp_path_factory.mktemp("model") / "chat.gguf", chats.CHATML, "f16")


def test_nothing_to_say_about_a_good_file(gguf: Path) -> None:
    assert lint(gguf) == []


def test_an_end_token_that_only_a_stop_string_knows(tmp_path: Path) -> None:
    to_gguf(models.TRAINED.parents[1] / "ollama" / "chat", tmp_path / "m.gguf")
    found = lint(tmp_path / "m.gguf")
    assert [f.level for f in found] == ["warning"]
    assert "answers end with '<|fin|>', which the GGUF does not call an end token" in found[0].text


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (KeyValue("llama.block_count", ValueType.U64, 2), "llama.block_count is U64"),
        (KeyValue("general.file_type", ValueType.I32, 1), "general.file_type is I32"),
        (KeyValue("tokenizer.ggml.add_bos_token", ValueType.U8, 1), "is no bool"),
    ],
)
def test_types(gguf: Path, entry: KeyValue, text: str) -> None:
    file = open_gguf(gguf)
    changed = replace(file, entries={**file.entries, entry.key: entry})
    assert text in " ".join(f.text for f in _types(changed) if f.level == "error")


def test_ternary_and_split_files(gguf: Path) -> None:
    file = open_gguf(gguf)
    name, info = next(iter(file.tensors.items()))
    ternary = replace(info, type=replace(info.type, name="TQ1_0"))
    changed = replace(file, tensors={**file.tensors, name: ternary}, paths=(gguf, gguf))
    texts = " ".join(f.text for f in _tensors(changed))
    assert "TQ1_0" in texts
    assert "split into 2 files" in texts


def test_nan_is_found(gguf: Path, tmp_path: Path) -> None:
    file = open_gguf(gguf)
    info = next(t for t in file.tensors.values() if t.type.name == "F16")
    data = bytearray(gguf.read_bytes())
    data[info.offset : info.offset + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(data)
    assert f"tensor {info.name} has NaN" in lint(tmp_path / "nan.gguf")[0].text
    assert not [f for f in lint(tmp_path / "nan.gguf", False) if "NaN" in f.text]


def facts(gguf: Path, template: str | None) -> ModelFacts:
    return replace(facts_of(gguf), chat_template=template)


def rendered(gguf: Path, jinja: str | None, template: str | None) -> list[str]:
    return [p.renderer for p in explain(facts(gguf, jinja), template)]


def test_who_makes_the_prompt(gguf: Path) -> None:
    tools = "{# tools #}" + chats.CHATML
    go = "{{ range .Messages }}{{ .Content }}{{ end }}"
    assert rendered(gguf, chats.CHATML, go) == ["TEMPLATE"] * 3
    assert rendered(gguf, tools, go) == ["TEMPLATE", "Jinja", "Jinja"]
    assert rendered(gguf, tools, go + "{{ .Tools }}") == ["TEMPLATE"] * 3
    assert rendered(gguf, chats.CHATML, None) == ["guess", "Jinja", "Jinja"]
    assert rendered(gguf, None, None) == ["plain"] * 3


def test_the_prompt_is_the_same_whoever_makes_it(gguf: Path) -> None:
    tools = facts(gguf, "{# tools #}" + chats.CHATML)
    made = make_modelfile(tools, Wishes(source="x"))
    prompts = {p.prompt for p in explain(tools, made.modelfile.template)}
    assert prompts == {
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    }
    assert explain(tools, made.modelfile.template)[1].capabilities == ("completion", "tools")
