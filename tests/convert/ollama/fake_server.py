"""A small HTTP server that keeps the contract of Ollama's API: blobs, create, show, chat."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mconv.convert.ollama.go_template import parse_template
from mconv.convert.ollama.prompt import ollama_prompt
from mconv.errors import FormatError


@dataclass
class State:
    """What the server holds, and how it misbehaves (``fault``)."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fault: str = ""


class Handler(BaseHTTPRequestHandler):
    state: State

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.state.requests.append(f"HEAD {self.path}")
        self._answer(200 if self._digest() in self.state.blobs else 404, b"")

    def do_GET(self) -> None:
        values = {
            "/api/version": {"version": "0.30.0"},
            "/api/tags": {"models": [{"name": name} for name in self.state.models]},
        }
        self._json(200 if self.path in values else 404, values.get(self.path, {"error": "none"}))

    def do_DELETE(self) -> None:
        body = json.loads(self._body())
        self._json(200 if self.state.models.pop(body["model"], None) else 404, {})

    def do_POST(self) -> None:
        self.state.requests.append(f"POST {self.path}")
        body = self._body()
        if self.path.startswith("/api/blobs/"):
            self._blob(body)
        else:
            getattr(self, f"_{self.path.rsplit('/', 1)[1]}")(json.loads(body))

    def _blob(self, body: bytes) -> None:
        found = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if found != self._digest() or self.state.fault == "blob":
            self._json(400, {"error": "digest mismatch, expected x, got y"})
            return
        known = found in self.state.blobs
        self.state.blobs[found] = body
        self._answer(200 if known else 201, b"")

    def _create(self, body: dict) -> None:
        lines = [{"status": "parsing GGUF"}, {"status": "writing manifest"}, {"status": "success"}]
        if any(digest not in self.state.blobs for digest in body["files"].values()):
            lines[1:] = [{"error": "blob does not exist"}]
        elif self.state.fault == "create":
            lines[1:] = [{"error": "llama-quantize: unknown architecture"}]
        elif self.state.fault == "cut":
            lines.pop()
        else:
            try:
                parse_template(body.get("template", ""))
                self.state.models[body["model"]] = body
            except FormatError as error:
                lines[1:] = [{"error": f"template error: {error}"}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self._answer(200, text.encode(), "application/x-ndjson")

    def _show(self, body: dict) -> None:
        model = self.state.models.get(body["model"])
        if model is None:
            self._json(404, {"error": "model not found"})
            return
        template = "{{ .Prompt }}" if self.state.fault == "template" else model.get("template", "")
        digest = next(iter(model["files"].values()))
        if self.state.fault == "rewrite":
            digest = f"sha256:{'0' * 64}"
        modelfile = f"# a comment\nFROM /models/blobs/{digest.replace(':', '-')}\n"
        said = {"template": template, "system": model.get("system", ""), "modelfile": modelfile}
        self._json(200, said)

    def _chat(self, body: dict) -> None:
        model = self.state.models[body["model"]]
        if not body.get("_debug_render_only") or self.state.fault == "old":
            self._json(200, {"message": {"role": "assistant", "content": "hi"}, "done": True})
            return
        asked = [*model.get("messages", ()), *body["messages"]]
        if model.get("system") and body["messages"][0]["role"] != "system":
            asked.insert(0, {"role": "system", "content": model["system"]})
        messages = [(m["role"], m["content"]) for m in asked]
        prompt = ollama_prompt(parse_template(model["template"]), messages)
        if self.state.fault == "prompt":
            prompt += " "
        self._json(200, {"_debug_info": {"rendered_template": prompt}})

    def _digest(self) -> str:
        return self.path.rsplit("/", 1)[1]

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, status: int, value: Any) -> None:
        self._answer(status, json.dumps(value).encode())

    def _answer(self, status: int, data: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def fake_server() -> Iterator[tuple[str, State]]:
    """Run a server on a free port of the loopback."""
    state = State()
    handler = type("Bound", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
