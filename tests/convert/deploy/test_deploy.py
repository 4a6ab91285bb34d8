"""``mconv deploy`` as a user meets it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.deploy.deploy import label
from mconv.convert.gguf import open_gguf
from mconv.convert.ollama.names import parse_name
from mconv.convert.ollama.store import Store
from mconv.convert.ollama.verify import verify

sys.path.insert(0, str(Path(__file__).parent))
from deployments import CHAT, gguf, made

TRAINED = CHAT.parents[1] / "trained"


def run(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["deploy", *map(str, args)])
    return done.exit_code, done.output + str(done.exception or "")


def test_one_screen(tmp_path: Path) -> None:
    out = tmp_path / "serve"
    code, text = run(CHAT, "--replicas", 3, "--memory", "2GiB", "--k8s", "-o", out)
    assert code == 0, text
    assert len(text.splitlines()) < 24
    assert "4 slots of 512 tokens" in text  # the model's own context
    assert "of 2.15 GB" in text
    assert "ollama serve" in text
    assert "docker compose up -d" in text
    assert "kubectl apply" in text
    store = Store(out / "models")
    assert verify(store, parse_name("chat")) == ()
    listed = subprocess.run(
        ["sha256sum", "-c", "../models.sha256"], cwd=out / "models", capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    files = [p for p in (out / "models").rglob("*") if p.is_file()]
    assert len(listed.splitlines()) == len(files)  # every file is checked


def test_a_gguf_is_linked_not_copied(tmp_path: Path) -> None:
    first = made(tmp_path / "a", kind="llama-server", name="chat")
    model = first.folder / "models" / "chat.gguf"
    done = made(tmp_path / "b", model, kind="llama-server")
    assert (done.folder / "models" / "chat.gguf").stat().st_ino == model.stat().st_ino
    assert done.digests == {"chat.gguf": f"sha256:{hashlib.sha256(model.read_bytes()).hexdigest()}"}


@pytest.mark.parametrize("kind", ["ollama", "llama-server"])
def test_a_training_checkpoint_in_one_call(tmp_path: Path, kind: str) -> None:
    given = ["--tokenizer", TRAINED / "hf", "--config", TRAINED / "hf"]
    out = tmp_path / "serve"
    code, text = run(TRAINED / "zero3", "--kind", kind, "-q", "q8_0", "-o", out, *given, "--json")
    assert code == 0, text
    done = json.loads(text)
    largest = max((out / "models").rglob("*"), key=lambda p: p.stat().st_size)
    file = open_gguf(largest)
    assert done["memory"]["weights"] == sum(t.nbytes for t in file.tensors.values())
    assert "Q8_0" in {t.type.name for t in file.tensors.values()}


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("source", [CHAT, TRAINED / "zero3"], ids=["hf", "zero3"])
def test_hugging_face_servers_get_a_folder(tmp_path: Path, kind: str, source: Path) -> None:
    given = [] if source == CHAT else ["--tokenizer", TRAINED / "hf", "--config", TRAINED / "hf"]
    out = tmp_path / "serve"
    code, text = run(source, "--kind", kind, "--name", "me", "-o", out, *given)
    assert code == 0, text
    folder = out / "models" / "me"
    assert {"config.json", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    start = {"vllm": "vllm serve /models/me", "sglang": "sglang.launch_server --model-path"}
    assert start[kind] in text
    replica = yaml.safe_load((out / "compose.yaml").read_text())["services"]["replica-2"]
    assert replica["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == ["1"]


@pytest.mark.parametrize("source", ["checkpoint", "gguf"])
def test_an_end_token_that_llama_cpp_would_miss_is_named(tmp_path: Path, source: str) -> None:
    place = gguf(tmp_path) if source == "gguf" else CHAT
    done = made(tmp_path, place, kind="llama-server")
    file = open_gguf(done.folder / "models" / "chat.gguf")
    words = file["tokenizer.ggml.tokens"]
    assert words[file["tokenizer.ggml.eot_token_id"]] in ("<|fin|>", b"<|fin|>")


BAD: list[tuple[list[Any], str]] = [
    (["--memory", "1MB"], "one replica needs 0.25 GiB"),
    (["--rpc", "a=1GiB"], "--kind llama-server"),
    (["--kind", "llama-server", "--rpc", "a=1GiB", "--replicas", "2"], "--replicas 1"),
    (["--kind", "llama-server", "--rpc", "a=1MB"], "the layers need"),
    (["--kind", "llama-server", "--rpc", "a"], "is not HOST[:PORT]=MEMORY"),
    (["--kind", "vllm", "-q", "Q4_K_M"], "takes weights as they are"),
    (["--publish", "8080"], "is not ADDRESS:PORT"),
    (["--subnet", "8.8.8.0/24"], "is not private"),
    (["--kind", "llama-server", "--name", "a$b"], "model name 'a$b'"),
    (["-q", "Q99"], "unknown output type"),
]


@pytest.mark.parametrize(("args", "why"), BAD, ids=lambda v: str(v)[:40])
def test_what_cannot_be_is_told_and_leaves_nothing(
    tmp_path: Path, args: list[Any], why: str
) -> None:
    code, text = run(CHAT, "-o", tmp_path / "serve", *args)
    assert code != 0
    assert why in text
    assert list(tmp_path.iterdir()) == []


def test_only_a_deployment_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "serve"
    out.mkdir()
    (out / "precious").touch()
    assert "exists; replace it with --force" in run(CHAT, "-o", out)[1]
    assert "is no deployment of mconv" in run(CHAT, "-o", out, "--force")[1]
    assert (out / "precious").exists()
    (out / "precious").unlink()
    out.rmdir()
    assert run(CHAT, "-o", out)[0] == 0
    assert run(CHAT, "-o", out, "--force", "--replicas", 1)[0] == 0
    assert "replica-2" not in (out / "compose.yaml").read_text()


def test_the_same_wishes_give_the_same_files(tmp_path: Path) -> None:
    done = [made(tmp_path / name, kubernetes=True) for name in "ab"]
    for path in done[0].files:
        assert (done[0].folder / path).read_bytes() == (done[1].folder / path).read_bytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("My_Model:7B", "my-model-7b"),
        ("me/x:latest", "me-x"),
        ("--", "model"),
        ("7B", "m-7b"),
        ("a" * 99, "a" * 40),
    ],
)
def test_labels(name: str, text: str) -> None:
    assert label(name) == text
