"""How each kind of server is started: image, port, command line, health check.

Sources: the documentation of Ollama, llama.cpp's server, vLLM and SGLang, and their images, which
all have ``sh`` and ``sha256sum``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

KindName = Literal["ollama", "llama-server", "vllm", "sglang"]
KINDS: tuple[KindName, ...] = ("ollama", "llama-server", "vllm", "sglang")
#: Kinds that want a Hugging Face folder; the others take GGUF.
HF_KINDS = ("vllm", "sglang")
#: Where the model lies in a container.
MODELS = "/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What to serve, and how.

    Attributes:
        kind: of server.
        name: what clients call the model.
        label: the same as a DNS label, for services.
        file: the model below ``/models``; the model's name in the store for Ollama.
        replicas: how many servers.
        context: tokens per slot.
        slots: requests at once per server.
        gpus: GPUs per server; 0 computes on the CPU.
        image: instead of the kind's own.
    """

    kind: KindName
    name: str
    label: str
    file: str
    replicas: int
    context: int
    slots: int
    gpus: int = 0
    image: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One server in a container.

    Attributes:
        image: to run.
        port: it listens on.
        command: the exact serve line.
        environment: variables.
        health: a command that succeeds when the model answers.
        path: of the same question over HTTP.
    """

    image: str
    port: int
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    health: tuple[str, ...]
    path: str


def runtime(serving: Serving) -> Runtime:
    """Return how the server of a deployment is run."""
    return {
        "ollama": _ollama,
        "llama-server": _llama_server,
        "vllm": _vllm,
        "sglang": _sglang,
    }[serving.kind](serving)


def _ollama(serving: Serving) -> Runtime:
    return Runtime(
        image=serving.image or "ollama/ollama:latest",
        port=11434,
        command=("ollama", "serve"),
        environment={
            "OLLAMA_HOST": "0.0.0.0:11434",
            "OLLAMA_MODELS": MODELS,
            "OLLAMA_NOPRUNE": "1",  # the store is read-only
            "OLLAMA_KEEP_ALIVE": "-1",
            "OLLAMA_NUM_PARALLEL": str(serving.slots),
            "OLLAMA_CONTEXT_LENGTH": str(serving.context),
            "OLLAMA_MAX_LOADED_MODELS": "1",
        },
        # healthy when the model is loaded; start.sh loads it
        health=("/bin/sh", "-c", f"ollama ps | grep -qi '^{serving.file}'"),
        path="/api/version",
    )


def llama_server_command(serving: Serving, binary: str = "/app/llama-server") -> tuple[str, ...]:
    """Return the serve line of llama.cpp; its ``--ctx-size`` is that of all slots together."""
    return (
        binary, "--model", f"{MODELS}/{serving.file}", "--alias", serving.name,
        "--host", "0.0.0.0", "--port", "8080",
        "--ctx-size", str(serving.context * serving.slots), "--parallel", str(serving.slots),
        *(("--n-gpu-layers", "999") if serving.gpus else ()),
    )  # fmt: skip


def _llama_server(serving: Serving) -> Runtime:
    flavour = "server-cuda" if serving.gpus else "server"
    return Runtime(
        image=serving.image or f"ghcr.io/ggml-org/llama.cpp:{flavour}",
        port=8080,
        command=llama_server_command(serving),
        health=("curl", "-fsS", "http://127.0.0.1:8080/health"),
        path="/health",
    )


def _python_health(port: int) -> tuple[str, ...]:
    ask = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health', timeout=4)"
    return ("python3", "-c", ask)


def _vllm(serving: Serving) -> Runtime:
    return Runtime(
        image=serving.image or "vllm/vllm-openai:latest",
        port=8000,
        command=(
            "vllm", "serve", f"{MODELS}/{serving.file}", "--served-model-name", serving.name,
            "--host", "0.0.0.0", "--port", "8000", "--max-model-len", str(serving.context),
            "--max-num-seqs", str(serving.slots),
            "--tensor-parallel-size", str(max(serving.gpus, 1)),
        ),
        environment={"HF_HUB_OFFLINE": "1"},
        health=_python_health(8000),
        path="/health",
    )  # fmt: skip


def _sglang(serving: Serving) -> Runtime:
    return Runtime(
        image=serving.image or "lmsysorg/sglang:latest",
        port=30000,
        command=(
            "python3", "-m", "sglang.launch_server", "--model-path", f"{MODELS}/{serving.file}",
            "--served-model-name", serving.name, "--host", "0.0.0.0", "--port", "30000",
            "--context-length", str(serving.context),
            "--max-running-requests", str(serving.slots), "--tp-size", str(max(serving.gpus, 1)),
        ),
        environment={"HF_HUB_OFFLINE": "1"},
        health=_python_health(30000),
        path="/health",
    )  # fmt: skip


_CHECK = """#!/bin/sh
# Compares the model with its digests, then starts the server.
set -eu
cd /models
if ! sha256sum -c /deploy/models.sha256 > /tmp/digests; then
    grep -v ': OK$' /tmp/digests >&2
    echo "the model is not the one of models.sha256; this server does not start" >&2
    exit 1
fi
"""
_PLAIN = 'exec "$@"\n'
_WARM = """"$@" &
server=$!
trap 'kill -TERM "$server" 2>/dev/null || true' TERM INT
# load the model now, not at the first question
while kill -0 "$server" 2>/dev/null; do
    if ollama list > /dev/null 2>&1; then
        ollama run {name} "" < /dev/null > /dev/null 2>&1 || echo "{name} did not load" >&2
        break
    fi
    sleep 1
done
wait "$server" || wait "$server"
"""


def start_script(serving: Serving) -> str:
    """Return the script that every replica runs: check the digests, then serve."""
    return _CHECK + (_WARM.format(name=serving.file) if serving.kind == "ollama" else _PLAIN)
