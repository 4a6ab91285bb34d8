"""The written serve line on real RPC servers: MCONV_TEST_LLAMA_BIN names llama.cpp's binaries."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from mconv.convert.deploy.deploy import DeployWishes, deploy
from mconv.convert.deploy.rpc import Machine

sys.path.insert(0, str(Path(__file__).parent))
from deployments import CHAT

BIN = Path(os.environ.get("MCONV_TEST_LLAMA_BIN", "/nowhere"))

pytestmark = pytest.mark.skipif(
    not (BIN / "ggml-rpc-server").exists(),
    reason="MCONV_TEST_LLAMA_BIN names no folder with llama-server and ggml-rpc-server",
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_layers_lie_where_the_plan_says(tmp_path: Path) -> None:
    ports, front = [free_port(), free_port()], free_port()
    work = 270864384  # beside the layers, as the plan says; so that no machine holds them all
    machines = [Machine(f"127.0.0.1:{port}", work + 500_000) for port in ports]
    wishes = DeployWishes(kind="llama-server", replicas=1, machines=machines, slots=1, context=512)
    done = deploy(CHAT, tmp_path / "serve", wishes)
    assert all(part.layers for part in done.parts)
    line = [str(BIN / "llama-server"), *done.line[1:]]
    line[line.index("--model") + 1] = str(done.folder / "models" / done.serving.file)
    line[line.index("--host") + 1], line[line.index("--port") + 1] = "127.0.0.1", str(front)
    with ExitStack() as stack:
        for port in ports:
            start(stack, [str(BIN / "ggml-rpc-server"), "--host", "127.0.0.1", "--port", str(port)])
        time.sleep(1)
        log = tmp_path / "log"
        start(stack, [*line, "--verbose", "--no-warmup", "--fit", "off"], log)
        end = time.monotonic() + 120
        while not healthy(f"http://127.0.0.1:{front}/health"):
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        body = {"prompt": "a", "n_predict": 2}
        request = urllib.request.Request(
            f"http://127.0.0.1:{front}/completion", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["tokens_predicted"] == 2
    placed = re.findall(r"layer +\d+ assigned to device (RPC\d)", log.read_text())
    layers = placed[: sum(part.layers for part in done.parts)]
    assert [layers.count(f"RPC{k}") for k in range(2)] == [part.layers for part in done.parts]


def start(stack: ExitStack, command: list[str], log: Path | None = None) -> None:
    out = stack.enter_context(log.open("w")) if log else subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    stack.callback(process.wait)
    stack.callback(process.kill)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
