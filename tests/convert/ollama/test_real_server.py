"""The same promises against a real Ollama server: OLLAMA_HOST names it.

MCONV_TEST_OLLAMA_STORE names the models folder that this server reads, if it is on this machine.
Every model made here is called ``mconv-test-...`` and removed again.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import secrets
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mconv.convert.ollama.build import Wishes
from mconv.convert.ollama.bundle import bundle, unbundle
from mconv.convert.ollama.explain import explain
from mconv.convert.ollama.facts import facts_of
from mconv.convert.ollama.go_writer import go_template
from mconv.convert.ollama.induce import induce
from mconv.convert.ollama.install import Installed, install
from mconv.convert.ollama.jinja_chat import TemplateRefusedError, compile_chat
from mconv.convert.ollama.names import ModelName, parse_name
from mconv.convert.ollama.proof import CONVERSATIONS, jinja_prompt
from mconv.convert.ollama.server import Server, ServerError
from mconv.convert.ollama.store import Store, hash_file
from mconv.convert.ollama.verify import verify
from mconv.convert.to_gguf import to_gguf

sys.path.insert(0, str(Path(__file__).parent))
import chats
import models

pytestmark = pytest.mark.skipif(
    "OLLAMA_HOST" not in os.environ, reason="OLLAMA_HOST names no server"
)

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "ollama"
CHAT = FIXTURES / "chat"
TALKS = json.loads((FIXTURES / "talks.json").read_text(encoding="utf-8"))
WISHES = Wishes(source="x", parameters={"seed": 3, "temperature": 0.0})


@pytest.fixture
def server() -> Server:
    return Server(os.environ["OLLAMA_HOST"])


@pytest.fixture
def name(server: Server) -> Iterator[ModelName]:
    text = f"mconv-test-{secrets.token_hex(3)}:v1"
    yield parse_name(text)
    if text in server.tags():
        server.delete(text)


@pytest.fixture
def store() -> Store:
    folder = os.environ.get("MCONV_TEST_OLLAMA_STORE")
    if not folder:
        pytest.skip("MCONV_TEST_OLLAMA_STORE names no models folder")
    return Store(Path(folder))


def put(way: str, name: ModelName, server: Server, request: pytest.FixtureRequest) -> Installed:
    target = server if way == "http" else request.getfixturevalue("store")
    return install(CHAT, name, target, WISHES, quantize="q8_0")


WAYS = pytest.mark.parametrize("way", ["http", "store"])


@WAYS
def test_the_server_shows_what_was_installed(
    way: str, server: Server, name: ModelName, request: pytest.FixtureRequest
) -> None:
    done = put(way, name, server, request)
    assert str(name) in server.tags()
    said = server.show(str(name))
    assert said["template"] == done.made.modelfile.template
    stops = re.findall(r'^stop +"(.*)"$', said["parameters"], re.M)
    assert stops == list(done.made.modelfile.parameters["stop"])
    assert said["details"]["quantization_level"] == "Q8_0"
    assert said["details"]["family"] == "llama"


@WAYS
def test_the_server_renders_the_proven_prompts(
    way: str, server: Server, name: ModelName, request: pytest.FixtureRequest
) -> None:
    put(way, name, server, request)
    try:
        got = server.render(str(name), [("user", "Who are you?")])
    except ServerError as error:
        pytest.skip(f"this server cannot render: {error}")
    assert (
        got
        == "<|von|>system\nBe brief.<|fin|>\n<|von|>user\nWho are you?<|fin|>\n<|von|>assistant\n"
    )


@pytest.mark.parametrize("system", [None, "Speak like a pirate."])
@pytest.mark.parametrize("begun", [(), (("user", "Hi"), ("assistant", "Ho"))])
def test_all_conversations_are_proven_on_the_server(
    server: Server, name: ModelName, system: str | None, begun: tuple[tuple[str, str], ...]
) -> None:
    done = install(CHAT, name, server, replace(WISHES, system=system, messages=begun))
    if any("does not render" in warning for warning in done.warnings):
        pytest.skip("this server cannot render")
    count = 5 if begun else 10
    said = f"the server renders {count} of {count} prompts as the model's own template"
    assert said in done.checks


@WAYS
def test_the_model_answers_and_stops(
    way: str, server: Server, name: ModelName, request: pytest.FixtureRequest
) -> None:
    put(way, name, server, request)
    for question, answer in TALKS:
        body = {
            "model": str(name),
            "messages": [{"role": "user", "content": question}],
            "stream": False,
            "options": {"num_predict": 60},
        }
        said = ask(server, "/api/chat", body)
        assert said["message"]["content"] == answer
        assert said["done_reason"] == "stop"


def ask(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    url = server.url if "://" in server.url else f"http://{server.url}"
    request = urllib.request.Request(url + path, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        if "binary not found" in text:
            pytest.skip("this server cannot generate")
        raise AssertionError(text) from None


def test_what_the_server_stored_is_whole_and_travels(
    server: Server, name: ModelName, store: Store, tmp_path: Path
) -> None:
    install(CHAT, name, server, WISHES)
    assert verify(store, name) == ()
    bundle(store, name, tmp_path / "x.tar")
    server.delete(str(name))
    assert str(name) not in server.tags()
    unbundle(store, tmp_path / "x.tar")
    assert str(name) in server.tags()
    assert verify(store, name) == ()


def test_errors_of_the_server_are_told(server: Server, name: ModelName) -> None:
    with pytest.raises(ServerError, match=r"create fails|create answers"):
        server.create({"model": str(name), "files": {"m.gguf": f"sha256:{'0' * 64}"}})
    with pytest.raises(ServerError, match="refuses blob"):
        server.send_blob(CHAT / "config.json", f"sha256:{'0' * 64}")


@pytest.mark.parametrize("template", ["chatml", "tools", "default system"])
def test_what_explain_foretells_comes_true(
    template: str, server: Server, name: ModelName, store: Store, tmp_path: Path
) -> None:
    jinja = "{# tools #}" + chats.DEFAULT_SYSTEM if template == "tools" else chats.ALL[template]
    gguf = models.chat_gguf(tmp_path / "m.gguf", jinja)
    done = install(gguf, name, store, WISHES)
    try:
        got = server.render(str(name), [("system", "Be brief."), ("user", "Hi")])
    except ServerError as error:
        pytest.skip(f"this server cannot render: {error}")
    capabilities = tuple(sorted(server.show(str(name))["capabilities"]))
    foretold = explain(facts_of(gguf), done.made.modelfile.template)
    version = tuple(int(n) for n in re.findall(r"\d+", server.version())[:3])
    if version > (0, 0, 0):  # a build of one's own says 0.0.0 and may be of any generation
        at = 0 if version < (0, 30, 0) else 1 if version < (0, 34, 1) else 2
        foretold = foretold[at : at + 1]
    assert (capabilities, got) in [(p.capabilities, p.prompt) for p in foretold]


def test_real_templates_on_the_server(
    server: Server, name: ModelName, data_dir: Path, tmp_path: Path
) -> None:
    """Ollama itself renders the emitted templates of all real models: every byte as Jinja does."""
    folder, gguf = models.chat_model(tmp_path / "m", chats.CHATML), tmp_path / "m.gguf"
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 8192  # a server cuts prompts that are longer
    (folder / "config.json").write_text(json.dumps(config))
    to_gguf(folder, gguf)
    digest = hash_file(gguf)
    server.send_blob(gguf, digest)
    compared, different = 0, []
    for path in sorted((data_dir / "templates").glob("*.jinja")):
        chat = compile_chat(path.read_text(encoding="utf-8"), {"eos_token": "</s>"})
        try:
            chat.render([("user", "x")])
        except TemplateRefusedError:
            continue
        template = go_template(induce(chat))
        server.create(
            {
                "model": str(name),
                "files": {"m.gguf": digest},
                "template": template,
                "parameters": {"num_ctx": 8192},
            }
        )
        for title, messages in CONVERSATIONS:
            try:
                expected = jinja_prompt(chat, messages, datetime.datetime.now())
            except TemplateRefusedError:
                continue
            try:
                got = server.render(str(name), messages)
            except ServerError as error:
                pytest.skip(f"this server cannot render: {error}")
            compared += 1
            if got != expected:
                different.append((path.stem, title, expected, got))
    assert compared > 500
    assert not different, [d[:2] for d in different]


@WAYS
def test_an_adapter_is_taken(
    way: str, server: Server, name: ModelName, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """This one changes nothing; releases from 0.34.1 refuse it over HTTP."""
    adapter = models.adapter_gguf(tmp_path / "lora.gguf")
    target = server if way == "http" else request.getfixturevalue("store")
    install(CHAT, name, target, replace(WISHES, adapter=str(adapter)), quantize="f16")
    assert "ADAPTER" in server.show(str(name))["modelfile"]
    question, answer = TALKS[0]
    message = {"role": "user", "content": question}
    said = ask(server, "/api/chat", {"model": str(name), "messages": [message], "stream": False})
    assert said["message"]["content"] == answer
