"""Modelfiles of models: template, stops, sampling, context, licence; the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.ollama.build import Wishes, make_modelfile
from mconv.convert.ollama.facts import facts_of, make_facts
from mconv.convert.ollama.modelfile import parse
from mconv.convert.ollama.modelfile_values import emit, interpret
from mconv.errors import ConfigError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parent))
import chats
import models

SAMPLING = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "chat.gguf"
    return models.chat_gguf(path, chats.SYSTEM_IN_LAST_USER, do_sample=True, **SAMPLING)


def test_a_checkpoint_and_its_gguf_give_the_same(gguf: Path) -> None:
    made = [make_modelfile(facts_of(p), Wishes(source="x")) for p in (gguf, gguf.with_suffix(""))]
    assert made[0].modelfile == made[1].modelfile
    assert made[0].modelfile.parameters == {
        "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repeat_penalty": 1.05,
        "num_ctx": 256, "stop": ("</s>",),
    }  # fmt: skip
    assert made[0].proof is not None
    assert made[0].proof.ok
    assert "<s>" not in (made[0].modelfile.template or "")  # the tokenizer adds it


def test_the_emitted_file_reads_back(gguf: Path) -> None:
    wishes = Wishes(
        source="./my model.gguf",
        system='Say "hi".\n\nBe {{brief}}.',
        messages=[("user", "a"), ("assistant", "b")],
        parameters={"seed": 7, "top_k": 3},
    )
    made = make_modelfile(facts_of(gguf), wishes)
    again = interpret(parse(emit(made.modelfile)))
    assert again == made.modelfile
    assert (again.parameters["seed"], again.parameters["top_k"]) == (7, 3)


def test_kv_memory(gguf: Path) -> None:
    facts = facts_of(gguf)
    config = json.loads((gguf.with_suffix("") / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    each = config["num_hidden_layers"] * config["num_key_value_heads"] * width * 2 * 2
    assert facts.kv_bytes(100) == 100 * each


@pytest.mark.parametrize(("asked", "context"), [(100, 100), (10**6, 256), (0, None)])
def test_context(gguf: Path, asked: int, context: int | None) -> None:
    made = make_modelfile(facts_of(gguf), Wishes(source="x", context=asked))
    assert made.modelfile.parameters.get("num_ctx") == context


def test_greedy_models_get_temperature_0(tmp_path: Path) -> None:
    folder = models.chat_model(tmp_path / "m", chats.CHATML, do_sample=False, **SAMPLING)
    assert facts_of(folder).sampling == {"temperature": 0.0}


def test_several_end_tokens_and_the_licence(tmp_path: Path) -> None:
    folder = models.chat_model(tmp_path / "m", chats.CHATML, eos_token_id=[2, 5])
    (folder / "LICENSE").write_text("Yours.\n")
    facts = facts_of(folder)
    assert len(facts.eog) == 2
    assert make_modelfile(facts, Wishes(source="x")).modelfile.licenses == ("Yours.\n",)
    without = make_modelfile(facts, Wishes(source="x", license=False))
    assert without.modelfile.licenses == ()


def test_a_model_without_chat_template_passes_prompts(tmp_path: Path) -> None:
    made = make_modelfile(facts_of(models.chat_model(tmp_path / "m", None)), Wishes(source="x"))
    assert made.modelfile.template == "{{ .Prompt }}"
    assert made.modelfile.parameters["stop"] == ("</s>",)
    assert made.proof is None


def test_what_old_releases_refuse_is_told(tmp_path: Path) -> None:
    made = make_modelfile(
        facts_of(models.chat_model(tmp_path / "m", chats.DATED)), Wishes(source="x")
    )
    assert made.proof is not None
    assert made.proof.ok
    assert "before 0.11 refuse it" in " ".join(made.warnings)


VARYING = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"


def test_what_cannot_be_proven_is_refused(tmp_path: Path) -> None:
    facts = facts_of(models.chat_model(tmp_path / "m", VARYING))
    with pytest.raises(UnsupportedError, match="no Go template gives the model's prompts"):
        make_modelfile(facts, Wishes(source="x"))
    made = make_modelfile(facts, Wishes(source="x", allow_template_drift=True))
    assert made.modelfile.template is None
    assert "before 0.30 chat wrongly" in made.warnings[0]


@pytest.mark.parametrize("parameters", [{"temprature": 1.0}, {"top_k": 0.5}])
def test_only_legal_parameters(gguf: Path, parameters: dict) -> None:
    made = make_modelfile(facts_of(gguf), Wishes(source="x", parameters=parameters))
    with pytest.raises(ConfigError):
        emit(made.modelfile)


def test_bad_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_p": "x"}')
    with pytest.raises(ConfigError, match="top_p is 'x'"):
        make_facts(tmp_path / "m.gguf", {})


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(a) for a in args])
    return done.exit_code, done.output + str(done.exception or "")


def test_the_command_writes_and_checks(gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "Modelfile"
    code, text = run("modelfile", gguf, "-o", out, "--system", "Hi", "--parameter", "stop=a",
                     "--message", "user:x: y")  # fmt: skip
    assert code == 0, text
    assert "in 10 of 10 conversations" in text
    said = interpret(parse(out.read_bytes()))
    assert (out.parent / said.models[0]).resolve() == gguf.resolve()
    assert (said.system, said.messages) == ("Hi", (("user", "x: y"),))
    assert said.parameters["stop"] == ("a",)
    assert run("modelfile", "--check", out) == (0, f"{out}: legal, 0 warnings\n")
    assert "exists" in run("modelfile", gguf, "-o", out)[1]


def test_the_command_as_json(gguf: Path) -> None:
    code, text = run("modelfile", gguf, "--json")
    answer = json.loads(text)
    assert code == 0
    assert answer["proven"] is True
    assert len(answer["conversations"]) == 10


def test_check_finds_errors(tmp_path: Path) -> None:
    path = tmp_path / "Modelfile"
    path.write_text("FROM x\nPARAMETR top_k 3\n")
    code, text = run("modelfile", "--check", path)
    assert code != 0
    assert "Modelfile:2:" in text
    assert "did you mean 'PARAMETER'" in text
