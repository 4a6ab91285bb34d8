"""The commands as a new user meets them: the whole chain, and one test for each of the others."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.ollama.modelfile import parse
from mconv.convert.ollama.modelfile_values import interpret
from mconv.convert.to_gguf import to_gguf

sys.path.insert(0, str(Path(__file__).parent))
import chats
import models
from store_reader import read_store

CHAT = Path(__file__).resolve().parents[2] / "fixtures" / "ollama" / "chat"
TRAINED = models.TRAINED


def run(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(a) for a in args])
    return done.exit_code, done.output + str(done.exception or "")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "chat.gguf"
    to_gguf(CHAT, path, "f16")
    return path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A ZeRO-3 checkpoint with config and tokenizer beside it, as trainers leave them."""
    folder = tmp_path / "zero3-checkpoint"
    shutil.copytree(TRAINED.parent / "zero3", folder)
    files = models.chat_model(tmp_path / "hf", chats.CHATML)
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(files / name, folder)
    return folder


def test_the_whole_chain_in_one_command(run_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "models"
    code, text = run(
        "ollama", "install", run_folder, "--name", "my-model", "-q", "Q4_K_M", "--store", store
    )
    assert code == 0, text
    assert len(text.splitlines()) < 24
    for said in ("installed  my-model:latest in", "weights", "in 10 of 10 conversations",
                 "stop  '<|im_end|>'", "context  256", "ollama run my-model:latest"):  # fmt: skip
        assert said in text
    model = read_store(store)["registry.ollama.ai/library/my-model:latest"]
    assert model["config"]["file_type"] == "Q4_K_M"
    assert b"<|im_start|>" in model["template"]
    assert run("ollama", "verify", "my-model", "--store", store) == (0, "my-model:latest: whole\n")


def test_install_as_json_with_everything(gguf: Path, tmp_path: Path) -> None:
    store = tmp_path / "models"
    adapter = models.adapter_gguf(tmp_path / "lora.gguf")
    code, text = run(
        "ollama", "install", gguf, "--name", "me/x:1", "--store", store, "--json", "--adapter",
        adapter, "--system", "Hi.", "--message", "user:a", "--message", "assistant:b", "--ctx", 100,
        "--parameter", "temperature=0.2",
    )  # fmt: skip
    assert code == 0, text
    answer = json.loads(text[: text.rindex("}") + 1])
    assert answer["proven"] is True
    assert "'<|fin|>' named as an end token, for releases from 0.30" in answer["checks"]
    (model,) = read_store(store).values()
    assert model["kinds"] == ["model", "adapter", "template", "system", "params", "messages"]
    assert model["adapter"] == adapter.read_bytes()
    assert json.loads(model["params"])["num_ctx"] == 100


def test_only_adapters_are_taken_for_adapters(gguf: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "s")
    wrong = models.adapter_gguf(tmp_path / "a.gguf", family="qwen2")
    code, text = run("ollama", "install", gguf, "--name", "x", *store, "--adapter", wrong)
    assert (code != 0, "is an adapter for qwen2, not llama" in text) == (True, True)
    code, text = run("ollama", "install", gguf, "--name", "x", *store, "--adapter", gguf)
    assert (code != 0, "is no GGUF adapter" in text) == (True, True)
    code, text = run("ollama", "install", gguf, "--name", "x", *store, "--adapter", CHAT)
    assert (code != 0, "not into a GGUF file" in text) == (True, True)
    assert not (tmp_path / "s").exists()


def test_bundle_unbundle_verify(gguf: Path, tmp_path: Path) -> None:
    here, there, tar = tmp_path / "a", tmp_path / "b", tmp_path / "x.tar"
    assert run("ollama", "install", gguf, "--name", "talker", "--store", here, "--quiet")[0] == 0
    code, text = run("ollama", "bundle", "talker", "-o", tar, "--store", here)
    assert (code, "talker:latest, 4 blobs" in text) == (0, True)
    assert (
        "exists; replace it with --force"
        in run("ollama", "bundle", "talker", "-o", tar, "--store", here)[1]
    )
    assert run("ollama", "unbundle", tar, "--name", "bob", "--store", there)[0] == 0
    assert run("ollama", "verify", "bob", "--store", there) == (0, "bob:latest: whole\n")
    blob = max((there / "blobs").iterdir(), key=lambda p: p.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    code, text = run("ollama", "verify", "bob", "--store", there)
    assert (code, "is damaged" in text) == (2, True)
    code, text = run("ollama", "verify", "bop", "--store", there)
    assert (code != 0, "did you mean 'bob:latest'" in text) == (True, True)


def test_lint(gguf: Path, tmp_path: Path) -> None:
    code, text = run("ollama", "lint", gguf)
    assert code == 0
    assert "tokenizer.ggml.eot_token_id=int:" in text
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(gguf.read_bytes()[:-64])
    assert run("ollama", "lint", bad)[0] != 0
    found = json.loads(run("ollama", "lint", gguf, "--json")[1])
    assert [f["level"] for f in found] == ["warning"]


def test_explain(gguf: Path, tmp_path: Path) -> None:
    code, text = run("ollama", "explain", gguf)
    assert code == 0
    assert text.count("TEMPLATE:") == 3
    assert r"<|von|>user\nHi<|fin|>" in text
    (tmp_path / "Modelfile").write_text("FROM x\nTEMPLATE {{ .Prompt }}\n")
    found = json.loads(
        run("ollama", "explain", gguf, "--modelfile", tmp_path / "Modelfile", "--json")[1]
    )
    assert [p["prompt"] for p in found] == ["Hi"] * 3


def test_modelfile_of_a_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "m" / "Modelfile", models.adapter_gguf(tmp_path / "lora.gguf")
    out.parent.mkdir()
    (run_folder / "LICENSE").write_text("Yours.\n\nReally.\n")
    code, text = run("modelfile", run_folder, "-o", out, "--adapter", adapter)
    assert code == 0, text
    assert "write it with `mconv to-gguf" in text
    assert "refuse ADAPTER" in text
    assert "of keys and values" in text
    said = interpret(parse(out.read_bytes()))
    assert said.models == ("../zero3-checkpoint.gguf",)
    assert said.adapter == "../lora.gguf"
    assert said.licenses == ("Yours.\n\nReally.\n",)
    assert said.parameters["num_ctx"] == 256


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("PARAMETER top-k 3", "Modelfile:2: 'top-'"),
        ("PARAMETER topk 3", "Modelfile:2: unknown parameter 'topk' (did you mean 'top_k'?)"),
        ("TEMPLTE x", "Modelfile:2: unknown instruction 'TEMPLTE' (did you mean 'TEMPLATE'?)"),
        ('SYSTEM """a', "Modelfile:2: unexpected end of file"),
    ],
)
def test_check_names_line_and_remedy(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "Modelfile"
    path.write_text(f"FROM x\n{line}\n")
    code, text = run("modelfile", "--check", path)
    assert code != 0
    assert said in text


def test_check_as_json(tmp_path: Path) -> None:
    path = tmp_path / "Modelfile"
    path.write_text("FROM ./none.gguf\nPARAMETER stop a\n")
    code, text = run("modelfile", "--check", path, "--json")
    answer = json.loads(text)
    assert (code, answer["parameters"]) == (0, {"stop": ["a"]})
    assert ":1: FROM ./none.gguf: there is no such file" in answer["warnings"][0]
