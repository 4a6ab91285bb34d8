"""Installation over HTTP, against a small server that keeps the API's contract."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mconv.convert.ollama.build import Wishes
from mconv.convert.ollama.install import install
from mconv.convert.ollama.names import parse_name
from mconv.convert.ollama.server import Server, ServerError
from mconv.convert.ollama.store import hash_file
from mconv.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
import chats
import models
from fake_server import State, fake_server

NAME = parse_name("mconv-test:tiny")
WISHES = Wishes(source="x", system="Be brief.", parameters={"seed": 3})


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.chat_gguf(tmp_path_factory.mktemp("model") / "chat.gguf", chats.CHATML)


@pytest.fixture
def fake() -> Iterator[tuple[Server, State]]:
    with fake_server() as (url, state):
        yield Server(url), state


def test_install_and_read_back(gguf: Path, fake: tuple[Server, State]) -> None:
    server, state = fake
    done = install(gguf, NAME, server, WISHES)
    body = state.models["mconv-test:tiny"]
    assert body["files"] == {"model.gguf": hash_file(gguf)}
    assert state.blobs[done.digest] == gguf.read_bytes()
    assert body["parameters"] == {"num_ctx": 256, "seed": 3, "stop": ["<|im_end|>", "</s>"]}
    assert body["system"] == "Be brief."
    assert "the server renders 10 of 10 prompts as the model's own template" in done.checks
    assert {"template read back", "system read back"} <= set(done.checks)
    assert server.tags() == ["mconv-test:tiny"]


def test_messages_of_the_model_go_first(gguf: Path, fake: tuple[Server, State]) -> None:
    wishes = replace(WISHES, messages=[("user", "a"), ("assistant", "b")])
    done = install(gguf, NAME, fake[0], wishes)
    assert "the server renders 5 of 5 prompts as the model's own template" in done.checks


def test_a_second_run_sends_no_blob(gguf: Path, fake: tuple[Server, State]) -> None:
    server, state = fake
    install(gguf, NAME, server, WISHES)
    state.requests.clear()
    done = install(gguf, NAME, server, WISHES)
    assert "weights were there already" in done.checks
    assert not [r for r in state.requests if r.startswith("POST /api/blobs")]


def test_a_checkpoint_over_http(gguf: Path, fake: tuple[Server, State]) -> None:
    server, state = fake
    done = install(gguf.with_suffix(""), NAME, server, WISHES, quantize="q8_0")
    assert state.blobs[done.digest][:4] == b"GGUF"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("blob", "refuses blob .* 400 digest mismatch"),
        ("create", "create fails: llama-quantize: unknown architecture"),
        ("cut", "ended without success; the last was 'writing manifest'"),
    ],
)
def test_failures(gguf: Path, fake: tuple[Server, State], fault: str, message: str) -> None:
    server, state = fake
    state.fault = fault
    with pytest.raises(ServerError, match=message):
        install(gguf, NAME, server, WISHES)


@pytest.mark.parametrize(
    ("fault", "warning"),
    [
        ("template", "shows another template"),
        ("prompt", "prompt differs in conversation 'one question'"),
        ("old", "cannot show its prompts"),
    ],
)
def test_surprises_are_told(
    gguf: Path, fake: tuple[Server, State], fault: str, warning: str
) -> None:
    server, state = fake
    state.fault = fault
    assert warning in " ".join(install(gguf, NAME, server, WISHES).warnings)


def test_no_server() -> None:
    with pytest.raises(ServerError, match="is `ollama serve` running"):
        Server("127.0.0.1:9").version()


def test_no_work_is_done_for_a_server_that_is_not_there(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mconv.convert.ollama.install.to_gguf", None)
    with pytest.raises(ServerError, match="is `ollama serve` running"):
        install(gguf.with_suffix(""), NAME, Server("127.0.0.1:9"), WISHES)


@pytest.mark.parametrize("url", ["ftp://x", "http://", ""])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(ConfigError):
        Server(url)


def test_servers_that_rewrite_the_weights_are_noticed(
    gguf: Path, fake: tuple[Server, State]
) -> None:
    server, state = fake
    assert "weights read back" in install(gguf, NAME, server, WISHES).checks
    state.fault = "rewrite"
    assert "weights of its own making" in " ".join(install(gguf, NAME, server, WISHES).checks)


def test_an_adapter_is_sent_too(gguf: Path, fake: tuple[Server, State], tmp_path: Path) -> None:
    server, state = fake
    adapter = models.adapter_gguf(tmp_path / "lora.gguf")
    done = install(gguf, NAME, server, replace(WISHES, adapter=str(adapter)))
    assert state.models["mconv-test:tiny"]["adapters"] == {"lora.gguf": hash_file(adapter)}
    assert state.blobs[hash_file(adapter)] == adapter.read_bytes()
    assert any("refuse ADAPTER" in warning for warning in done.warnings)
