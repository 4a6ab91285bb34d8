"""llama.cpp answers through the proven prompt; stop strings and end tokens stop it.

``special`` says whether the server prints control tokens: Ollama's own runners before 0.30 did, so
that stop strings saw them; upstream llama.cpp, which runs from 0.30, does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mconv.convert.ollama.build import Made, Wishes, make_modelfile
from mconv.convert.ollama.facts import facts_of
from mconv.convert.ollama.go_template import parse_template
from mconv.convert.ollama.install import install
from mconv.convert.ollama.names import parse_name
from mconv.convert.ollama.prompt import ollama_prompt
from mconv.convert.ollama.store import Store
from mconv.convert.to_gguf import to_gguf

pytest.importorskip("xllamacpp")

sys.path.insert(0, str(Path(__file__).parent))
from store_reader import read_store

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "ollama"
TALKS = json.loads((FIXTURES / "talks.json").read_text(encoding="utf-8"))

ASK = """
import json, os, sys, xllamacpp
request = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = request["model"]
params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = params.fit_params = False
params.special = request["special"]
server = xllamacpp.Server(params)
answers = []
for prompt in request["prompts"]:
    answers.append(server.handle_completions({
        "prompt": prompt, "stop": request["stop"], "n_predict": 40, "temperature": 0}))
print("\\n" + json.dumps([a["choices"][0] for a in answers]), flush=True)
os._exit(0)  # ending the server in order may hang
"""


def ask(gguf: Path, prompts: list[str], stop: list[str], special: bool) -> list[dict[str, Any]]:
    """Let llama.cpp continue texts, in a process of its own."""
    request = {"model": str(gguf), "prompts": prompts, "stop": stop, "special": special}
    done = subprocess.run(
        [sys.executable, "-c", ASK], input=json.dumps(request), capture_output=True, text=True,
        check=True, timeout=120,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "chat.gguf"
    to_gguf(FIXTURES / "chat", path, "f16")
    return path


@pytest.fixture(scope="module")
def made(gguf: Path) -> Made:
    return make_modelfile(facts_of(gguf), Wishes(source="x"))


def prompts(made: Made) -> list[str]:
    template = parse_template(made.modelfile.template or "")
    return [ollama_prompt(template, [("user", question)]) for question, _ in TALKS]


def test_the_template_is_proven(made: Made) -> None:
    assert made.proof is not None
    assert made.proof.ok
    assert made.modelfile.parameters["stop"] == ("<|fin|>", "</s>")


def test_the_answers_are_right_and_stop_strings_end_them(gguf: Path, made: Made) -> None:
    stop = made.modelfile.parameters["stop"]
    assert isinstance(stop, tuple)
    said = ask(gguf, prompts(made), list(stop), special=True)
    assert [answer["text"] for answer in said] == [answer for _, answer in TALKS]
    assert {answer["finish_reason"] for answer in said} == {"stop"}


def test_without_stop_strings_they_do_not_end(gguf: Path, made: Made) -> None:
    said = ask(gguf, prompts(made)[:2], [], special=True)
    assert {answer["finish_reason"] for answer in said} == {"length"}


def test_a_second_turn_and_an_answer_begun(gguf: Path, made: Made) -> None:
    template = parse_template(made.modelfile.template or "")
    (one, first), (two, second), *_ = TALKS
    later = [("user", one), ("assistant", first), ("user", two)]
    begun = [*later, ("assistant", second[:11])]
    said = ask(gguf, [ollama_prompt(template, m) for m in (later, begun)], ["<|fin|>"], True)
    assert [answer["text"] for answer in said] == [second, second[11:]]


def test_what_the_new_servers_miss_is_told(gguf: Path, made: Made) -> None:
    said = ask(gguf, prompts(made)[:1], ["<|fin|>"], special=False)
    assert said[0]["finish_reason"] == "length"
    assert any("answers end with '<|fin|>'" in warning for warning in made.warnings)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("source", ["checkpoint", "gguf"])
def test_an_installed_model_ends_everywhere(
    tmp_path: Path, gguf: Path, source: str, special: bool
) -> None:
    root = tmp_path / "models"
    place = gguf if source == "gguf" else FIXTURES / "chat"
    done = install(place, parse_name("talker"), Store(root), Wishes(source="x"), quantize="q8_0")
    assert not any("answers end with" in warning for warning in done.warnings)
    (model,) = read_store(root).values()
    (tmp_path / "m.gguf").write_bytes(model["model"])
    template = parse_template(model["template"].decode())
    stop = json.loads(model["params"])["stop"]
    asked = [ollama_prompt(template, [("user", question)]) for question, _ in TALKS]
    said = ask(tmp_path / "m.gguf", asked, stop, special)
    assert [answer["text"] for answer in said] == [answer for _, answer in TALKS]
    assert {answer["finish_reason"] for answer in said} == {"stop"}
