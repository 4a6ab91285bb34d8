"""A running Ollama server over its HTTP API: upload blobs, create a model, read it back.

Source: Ollama's API. A blob is sent only if ``HEAD`` says it is absent, so a repeated run resumes;
``/api/create`` answers with status 200 and JSON lines in which errors hide, and succeeded only if
the last line says so. ``_debug_render_only`` (from 0.11.5) gives a prompt without generating.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import ConfigError, MconvError, OutputError
from .jinja_chat import Message
from .store import Progress

_CHUNK = 1 << 20
_TIMEOUT = 600


class ServerError(MconvError):
    """A server cannot be reached, refuses, or answers what it should not."""


class Server:
    """An Ollama server at ``url``, such as ``http://127.0.0.1:11434``."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the address of a server: http://HOST:PORT")
        self.url = url
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port or (443 if self._secure else 11434)
        self._prefix = parts.path.rstrip("/")

    def version(self) -> str:
        """Return the server's version."""
        return str(self._json("GET", "/api/version").get("version", ""))

    def tags(self) -> list[str]:
        """Return the names of its models."""
        return [str(m["name"]) for m in self._json("GET", "/api/tags").get("models") or ()]

    def show(self, name: str) -> Mapping[str, Any]:
        """Return what the server says of a model."""
        return self._json("POST", "/api/show", {"model": name})

    def has_blob(self, digest: str) -> bool:
        """Return whether a blob is there."""
        with self._request("HEAD", f"/api/blobs/{digest}", None, {}) as response:
            if response.status not in (200, 404):
                raise ServerError(f"{self.url}: HEAD of a blob answers {response.status}")
            return response.status == 200

    def send_blob(self, path: Path, digest: str, progress: Progress | None = None) -> bool:
        """Upload a file unless it is there; return whether it was sent.

        Raises:
            ServerError: the server refuses it, for instance for a wrong digest.
        """
        if self.has_blob(digest):
            return False
        size = path.stat().st_size
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        body = _pieces(path, size, progress)
        with self._request("POST", f"/api/blobs/{digest}", body, headers) as response:
            answer = response.read()
            if response.status not in (200, 201):
                raise ServerError(
                    f"{self.url}: refuses blob {digest}: {response.status} {_why(answer)}"
                )
        return True

    def create(self, request: Mapping[str, Any]) -> list[str]:
        """Create a model; return the states it went through.

        Raises:
            ServerError: the server reports an error, or stops before it succeeded.
        """
        states = []
        body = json.dumps({**request, "stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        with self._request("POST", "/api/create", body, headers) as response:
            if response.status != 200:
                raise ServerError(
                    f"{self.url}: create answers {response.status}: {_why(response.read())}"
                )
            for line in response:
                if not line.strip():
                    continue
                said = self._parse(line)
                if "error" in said:
                    raise ServerError(f"{self.url}: create fails: {said['error']}")
                states.append(str(said.get("status", "")))
        if not states or states[-1] != "success":
            last = states[-1] if states else "nothing"
            raise ServerError(f"{self.url}: create ended without success; the last was {last!r}")
        return states

    def delete(self, name: str) -> None:
        """Remove a model."""
        self._json("DELETE", "/api/delete", {"model": name})

    def render(self, name: str, messages: Sequence[Message]) -> str | None:
        """Return the prompt the server makes; None from servers that cannot say it."""
        request = {
            "model": name,
            "messages": [{"role": role, "content": text} for role, text in messages],
            "stream": False,
            "_debug_render_only": True,
            "options": {"num_predict": 1},  # older servers ignore the wish and generate
        }
        info = self._json("POST", "/api/chat", request).get("_debug_info")
        return str(info["rendered_template"]) if isinstance(info, dict) else None

    def _json(self, method: str, path: str, value: Any = None) -> Mapping[str, Any]:
        body = None if value is None else json.dumps(value).encode()
        headers = {} if value is None else {"Content-Type": "application/json"}
        with self._request(method, path, body, headers) as response:
            data = response.read()
            if response.status != 200:
                raise ServerError(f"{self.url}{path}: answers {response.status}: {_why(data)}")
        return self._parse(data) if data else {}

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError:
            raise ServerError(f"{self.url}: answers {data[:80]!r}, which is not JSON") from None
        if not isinstance(value, dict):
            raise ServerError(f"{self.url}: answers {data[:80]!r}, not an object")
        return value

    @contextmanager
    def _request(
        self, method: str, path: str, body: Any, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_TIMEOUT)
        try:
            connection.request(method, self._prefix + path, body, dict(headers))
            yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(
                f"{self.url}: no answer ({error}); is `ollama serve` running? --store DIR installs "
                "without a server"
            ) from None
        finally:
            connection.close()


def _pieces(path: Path, size: int, progress: Progress | None) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            yield data
            done += len(data)
            if progress:
                progress(done, size)
    if done != size:
        raise OutputError(f"{path}: changed while it was sent")


def _why(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return data[:200].decode("utf-8", "replace")
