"""Two llama.cpp servers behind real nginx on loopback: requests spread, and one may die."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from mconv.convert.deploy.nginx import nginx_conf

sys.path.insert(0, str(Path(__file__).parent))
from deployments import gguf

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 2, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = params.fit_params = False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(600)
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "did not come up"
        time.sleep(0.05)


@dataclass(frozen=True)
class Service:
    """nginx, and the servers behind it by address."""

    url: str
    servers: dict[str, subprocess.Popen]

    def ask(self, path: str, body: dict | None = None) -> tuple[int, str, str]:
        """Return (status, replica, answer)."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers.get("X-Replica", ""), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get("X-Replica", ""), ""

    def complete(self, k: int = 0) -> tuple[int, str, str]:
        return self.ask("/completion", {"prompt": f"What {k}?", "n_predict": 8, "temperature": 0})


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    pytest.importorskip("xllamacpp")
    assert NGINX is not None
    model, ports, front = gguf(tmp_path), [free_port(), free_port()], free_port()
    with ExitStack() as stack:
        servers = {}
        for port in ports:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(model), str(port)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            servers[f"127.0.0.1:{port}"] = process
        for address in servers:
            wait_for(lambda a=address: healthy(f"http://{a}/health"))
        conf = tmp_path / "nginx.conf"
        conf.write_text(nginx_conf(list(servers), f"127.0.0.1:{front}"))
        where = f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log;"
        nginx = subprocess.Popen(
            [NGINX, "-c", str(conf), "-p", str(tmp_path), "-g", where],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(nginx.wait)
        stack.callback(nginx.send_signal, signal.SIGQUIT)
        wait_for(lambda: healthy(f"http://127.0.0.1:{front}/balancer"))
        yield Service(f"http://127.0.0.1:{front}", servers)


def test_requests_spread_and_a_dead_replica_is_not_missed(service: Service) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(service.complete, range(24)))
    assert {status for status, _, _ in answers} == {200}
    assert all(json.loads(text)["content"] for _, _, text in answers)
    spread = Counter(replica for _, replica, _ in answers)
    assert set(spread) == set(service.servers)
    assert min(spread.values()) >= 6

    dead, alive = service.servers
    service.servers[dead].kill()
    service.servers[dead].wait()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(service.complete, range(12)))
    assert {status for status, _, _ in answers} == {200}
    assert {replica.split(", ")[-1] for _, replica, _ in answers} == {alive}


def test_what_changes_models_is_closed(service: Service) -> None:
    for path in ("/api/pull", "/api/delete", "/api/create", "/api/blobs/sha256:0", "/api/push"):
        assert service.ask(path, {"model": "x"})[:2] == (403, "")


def test_answers_stream(service: Service) -> None:
    body = {"prompt": "a", "n_predict": 4, "stream": True, "temperature": 0}
    status, _, text = service.ask("/completion", body)
    assert status == 200
    assert text.count("data: ") >= 2
