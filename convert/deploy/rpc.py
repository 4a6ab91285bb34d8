"""One model over several machines: its layers in a pipeline of llama.cpp's RPC servers.

llama.cpp gives layer ``i`` of ``n`` (the output counts as one more) to the first device whose share
of ``--tensor-split``, added up, exceeds ``i / (n + 1)``. Shares that are counts of layers therefore
place exactly so many. The protocol has no authentication: it belongs on a private network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ..gguf import GgufFile
from .compose import NGINX_IMAGE, addresses
from .servers import MODELS, Serving, llama_server_command

RPC_PORT = 50052
#: llama.cpp's own images come without RPC, so the image is the user's.
RPC_IMAGE = "${LLAMA_RPC_IMAGE:?an image of llama.cpp built with GGML_RPC=ON}"
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that runs an RPC server: ``host:port`` and the bytes it may use."""

    address: str
    memory: int


@dataclass(frozen=True, slots=True)
class Part:
    """What one machine holds: ``layers`` of the model, and ``nbytes`` with keys and values."""

    machine: Machine
    layers: int
    nbytes: int


def parse_machine(address: str, memory: int) -> Machine:
    """Return a machine; the port is llama.cpp's own by default.

    Raises:
        ConfigError: the address is none.
    """
    host, _, port = address.partition(":")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", host) or (port and not port.isdigit()):
        raise ConfigError(f"--rpc {address}: is not HOST or HOST:PORT")
    return Machine(f"{host}:{port or RPC_PORT}", memory)


def layer_bytes(gguf: GgufFile) -> list[int]:
    """Return the bytes of every layer; the last entry is the output with its norm."""
    sizes: dict[int, int] = {}
    output = 0
    for name, info in gguf.tensors.items():
        match = _LAYER.match(name)
        if match:
            sizes[int(match.group(1))] = sizes.get(int(match.group(1)), 0) + info.nbytes
        elif name.startswith("output"):
            output += info.nbytes
    if "output.weight" not in gguf.tensors and "token_embd.weight" in gguf.tensors:
        output += gguf.tensors["token_embd.weight"].nbytes  # tied: copied for the output
    return [sizes.get(k, 0) for k in range(max(sizes, default=-1) + 1)] + [output]


def split_layers(
    layers: Sequence[int], kv_per_layer: int, work: int, machines: Sequence[Machine]
) -> tuple[Part, ...]:
    """Give every machine as many layers, in order, as its share of all memory.

    Args:
        layers: bytes of each layer, the output last.
        kv_per_layer: bytes of keys and values of one layer.
        work: bytes that every machine needs beside.
        machines: in the order of the pipeline.

    Raises:
        ConfigError: they cannot hold the model together.
    """
    sizes = [size + kv_per_layer for size in layers[:-1]] + [layers[-1]]
    rooms = [machine.memory - work for machine in machines]
    best = _fill(sizes, rooms, machines)
    low, high = 0.0, 1.0
    while best is not None and high - low > 1e-9:  # the least degree to which all are filled
        degree = (low + high) / 2
        parts = _fill(sizes, [int(room * degree) for room in rooms], machines)
        best, low, high = (best, degree, high) if parts is None else (parts, low, degree)
    if best is not None:
        return best
    held = sum(room for room in rooms if room > 0)
    raise ConfigError(
        f"the layers need {sum(sizes) / 2**30:.2f} GiB with their keys and values, and the "
        f"machines hold {held / 2**30:.2f} GiB beside {work / 2**30:.2f} GiB each to compute: "
        "add a machine, quantize further, or lower --ctx or --parallel"
    )


def _fill(
    sizes: Sequence[int], rooms: Sequence[int], machines: Sequence[Machine]
) -> tuple[Part, ...] | None:
    parts, at = [], 0
    for room, machine in zip(rooms, machines, strict=True):
        start, used = at, 0
        while at < len(sizes) and used + sizes[at] <= room:
            used += sizes[at]
            at += 1
        parts.append(Part(machine, at - start, used))
    return tuple(parts) if at == len(sizes) else None


def serve_line(
    serving: Serving, parts: Sequence[Part], binary: str = "/app/llama-server"
) -> tuple[str, ...]:
    """Return the serve line of the head, which reads the model and sends out its layers."""
    held = [part for part in parts if part.layers]
    return (
        *llama_server_command(serving, binary),
        *(() if serving.gpus else ("--n-gpu-layers", "999")),
        "--rpc", ",".join(part.machine.address for part in held),
        "--device", ",".join(f"RPC{k}" for k in range(len(held))),
        "--tensor-split", ",".join(str(part.layers) for part in held),
    )  # fmt: skip


def head_compose(
    serving: Serving, line: Sequence[str], subnet: str, publish: str
) -> dict[str, Any]:
    """Return the compose file of the head: the server, and nginx in front of it."""
    (address,) = addresses(subnet, 1)
    head = {
        "image": RPC_IMAGE,
        "restart": "unless-stopped",
        "init": True,
        "entrypoint": ["/bin/sh", "/deploy/start.sh"],
        "command": list(line),
        "volumes": [
            f"./models:{MODELS}:ro",
            "./models.sha256:/deploy/models.sha256:ro",
            "./start.sh:/deploy/start.sh:ro",
        ],
        "healthcheck": {
            "test": ["CMD", "curl", "-fsS", "http://127.0.0.1:8080/health"],
            "interval": "10s",
            "timeout": "10s",
            "start_period": "1h",  # layers travel over the network first
        },
        "networks": {"serving": {"ipv4_address": address}},
    }
    front = {
        "image": NGINX_IMAGE,
        "restart": "unless-stopped",
        "volumes": ["./nginx.conf:/etc/nginx/nginx.conf:ro"],
        "ports": [f"{publish}:8080"],
        "depends_on": {"replica-1": {"condition": "service_started"}},
        "networks": {"serving": {}},
    }
    return {
        "name": serving.label,
        "services": {"replica-1": head, "balancer": front},
        "networks": {"serving": {"ipam": {"config": [{"subnet": subnet}]}}},
    }


def worker_compose(serving: Serving, machine: Machine) -> dict[str, Any]:
    """Return the compose file of one machine that computes layers; it needs no model file."""
    port = machine.address.rpartition(":")[2]
    worker = {
        "image": RPC_IMAGE,
        "restart": "unless-stopped",
        "init": True,
        "entrypoint": ["/app/ggml-rpc-server"],
        "command": ["--host", "0.0.0.0", "--port", port, "--cache"],
        "volumes": ["cache:/root/.cache/llama.cpp"],
        "ports": ["${RPC_BIND:?the private address of this machine; RPC has no password}:"
                  f"{port}:{port}"],
    }  # fmt: skip
    return {
        "name": f"{serving.label}-layers",
        "services": {"layers": worker},
        "volumes": {"cache": {}},
    }
