"""The written files against the parsers of the tools that read them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mconv.convert.deploy.compose import addresses
from mconv.convert.deploy.rpc import Machine
from mconv.convert.deploy.yaml_text import to_yaml
from mconv.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from deployments import CHAT, made

KINDS = ("ollama", "llama-server", "vllm", "sglang")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@pytest.fixture(scope="module", params=[(kind, gpus) for kind in KINDS for gpus in (0, 2)], ids=str)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    kind, gpus = request.param
    folder = tmp_path_factory.mktemp(kind)
    done = made(folder, kind=kind, gpus=gpus, replicas=3, kubernetes=True, memory=2**32)
    return done, done.folder


def services(folder: Path, name: str = "compose.yaml") -> dict[str, Any]:
    return yaml.safe_load((folder / name).read_text())["services"]


def test_compose_files_are_valid(written: tuple[Any, Path]) -> None:
    compose_spec = pytest.importorskip("compose_spec")
    text = (written[1] / "compose.yaml").read_text()
    assert set(compose_spec.PyCompose.from_yaml(text).service_names()) == {
        "replica-1", "replica-2", "replica-3", "balancer",
    }  # fmt: skip


def test_replicas_share_a_read_only_model(written: tuple[Any, Path]) -> None:
    done, folder = written
    found = services(folder)
    for k in range(3):
        replica = found[f"replica-{k + 1}"]
        assert "./models:/models:ro" in replica["volumes"]
        assert replica["entrypoint"] == ["/bin/sh", "/deploy/start.sh"]
        assert tuple(replica["command"]) == done.line
        assert replica["healthcheck"]["test"][0] == "CMD"
        for volume in replica["volumes"]:
            assert (folder / volume.split(":")[0]).exists()
            assert volume.endswith(":ro")
    assert found["balancer"]["ports"] == ["127.0.0.1:8080:8080"]


def test_every_replica_has_its_own_gpus(written: tuple[Any, Path]) -> None:
    done, folder = written
    used: list[str] = []
    for k in range(3):
        replica = services(folder)[f"replica-{k + 1}"]
        if done.serving.gpus:
            (device,) = replica["deploy"]["resources"]["reservations"]["devices"]
            used += device["device_ids"]
        else:
            assert replica["mem_limit"] == 2**32
    assert used == ([str(k) for k in range(6)] if done.serving.gpus else [])


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_takes_its_file(written: tuple[Any, Path], tmp_path: Path) -> None:
    check_nginx(written[1] / "nginx.conf", tmp_path)


def check_nginx(conf: Path, tmp_path: Path) -> None:
    assert NGINX is not None
    where = f"pid {tmp_path}/nginx.pid; error_log stderr;"
    done = subprocess.run(
        [NGINX, "-t", "-c", str(conf), "-p", str(tmp_path), "-g", where],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "syntax is ok" in done.stderr


def test_nginx_knows_the_addresses_of_compose(written: tuple[Any, Path]) -> None:
    done, folder = written
    conf = (folder / "nginx.conf").read_text()
    found = services(folder)
    ports = {"ollama": 11434, "llama-server": 8080, "vllm": 8000, "sglang": 30000}
    expected = [
        f"{found[f'replica-{k + 1}']['networks']['serving']['ipv4_address']}:"
        f"{ports[done.serving.kind]}"
        for k in range(3)
    ]
    assert re.findall(r"^ +server (\S+) max_fails", conf, re.M) == expected
    assert "least_conn;" in conf


def test_kubernetes_manifests_are_valid(written: tuple[Any, Path]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    folder = written[1] / "kubernetes"
    kinds = []
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            validate.validate(document, "1.30", strict=True)
            kinds.append(document["kind"])
    assert kinds.count("Service") == 3 + 2
    assert {"StatefulSet", "Deployment", "ConfigMap", "PersistentVolumeClaim"} <= set(kinds)


def test_kubernetes_balances_over_one_service_per_pod(written: tuple[Any, Path]) -> None:
    folder = written[1] / "kubernetes"
    objects = list(yaml.safe_load_all((folder / "serving.yaml").read_text()))
    by = {(o["kind"], o["metadata"]["name"]): o for o in objects}
    label = written[0].serving.label
    conf = by["ConfigMap", f"{label}-balancer"]["data"]["nginx.conf"]
    for k in range(3):
        service = by["Service", f"{label}-{k}"]["spec"]
        assert service["selector"] == {"statefulset.kubernetes.io/pod-name": f"{label}-{k}"}
        assert f"server {label}-{k}:{service['ports'][0]['port']} " in conf
    pod = by["StatefulSet", label]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert all(mount["readOnly"] for mount in container["volumeMounts"])
    assert container["command"][:2] == ["/bin/sh", "/deploy/start.sh"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_takes_the_file_for_kubernetes(written: tuple[Any, Path], tmp_path: Path) -> None:
    objects = yaml.safe_load_all((written[1] / "kubernetes" / "serving.yaml").read_text())
    label = written[0].serving.label
    (conf,) = [
        o["data"]["nginx.conf"]
        for o in objects
        if o["metadata"]["name"] == f"{label}-balancer" and o["kind"] == "ConfigMap"
    ]
    place = tmp_path / "nginx.conf"
    place.write_text(re.sub(rf"server {label}-\d:", "server 127.0.0.1:", conf))  # no DNS here
    check_nginx(place, tmp_path)


def test_rpc_files_are_valid(tmp_path: Path) -> None:
    compose_spec = pytest.importorskip("compose_spec")
    machines = [Machine("10.0.0.2:50052", 2**30), Machine("10.0.0.3:50052", 2**30)]
    done = made(tmp_path, kind="llama-server", replicas=1, machines=machines)
    for name in ("compose.yaml", "worker-1.yaml", "worker-2.yaml"):
        text = (done.folder / name).read_text()
        text = re.sub(r"\$\{RPC_BIND:\?[^}]+\}", "10.0.0.2", text)  # as compose does first
        text = re.sub(r"\$\{LLAMA_RPC_IMAGE:\?[^}]+\}", "me/llama.cpp:rpc", text)
        compose_spec.PyCompose.from_yaml(text)
    head = services(done.folder)["replica-1"]["command"]
    assert head[head.index("--rpc") + 1] == "10.0.0.2:50052,10.0.0.3:50052"
    shares = [int(n) for n in head[head.index("--tensor-split") + 1].split(",")]
    assert sum(shares) == 2 + 1  # two layers, and the output
    assert "RPC_BIND" in services(done.folder, "worker-1.yaml")["layers"]["ports"][0]
    if NGINX is not None:
        check_nginx(done.folder / "nginx.conf", tmp_path)


def digests(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run start.sh as a container would, with its folders moved here."""
    places = {"/models": folder / "models", "/deploy": folder, "/tmp/digests": folder / "digests"}
    script = (folder / "start.sh").read_text()
    named = re.compile("(?<= )(/models|/deploy|/tmp/digests)")
    script = named.sub(lambda match: str(places[match.group()]), script)
    (folder / "moved.sh").write_text(script)
    env = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        ["/bin/sh", str(folder / "moved.sh"), "echo", "served"],
        capture_output=True, text=True, check=False, env=env, timeout=60,
    )  # fmt: skip


def test_a_replica_starts_with_the_right_model_only(written: tuple[Any, Path]) -> None:
    folder = written[1]
    (folder / "bin").mkdir()
    (folder / "bin" / "ollama").write_text("#!/bin/sh\nexit 0\n")
    (folder / "bin" / "ollama").chmod(0o755)
    assert (digests(folder).returncode, digests(folder).stdout) == (0, "served\n")
    largest = max((p for p in (folder / "models").rglob("*")), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.unlink()  # it may be a link to the source
    largest.write_bytes(data)
    refused = digests(folder)
    assert refused.returncode == 1
    assert f"{largest.name}: FAILED" in refused.stderr
    assert "served" not in refused.stdout


def test_the_source_is_left_alone() -> None:
    assert (CHAT / "model.safetensors").stat().st_size == 215968


@pytest.mark.parametrize("subnet", ["10.0.0.0", "8.8.8.0/24", "10.0.0.0/29", "x"])
def test_bad_subnets(subnet: str) -> None:
    with pytest.raises(ConfigError, match="--subnet"):
        addresses(subnet, 3)


def test_yaml_is_plain() -> None:
    shared = {"a": 1}
    text = to_yaml([{"x": [shared, shared], "s": "a\nb\n", "n": "8080", "b": "yes"}], ["hi"])
    assert "&" not in text
    assert yaml.safe_load(text) == {"x": [shared, shared], "s": "a\nb\n", "n": "8080", "b": "yes"}
    assert text.startswith("# hi\n")
