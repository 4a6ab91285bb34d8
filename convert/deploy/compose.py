"""A compose file: N replicas with fixed addresses behind one balancer.

Addresses are fixed so that nginx never depends on a replica being up to find the others: a
container that is down has no name in Docker's DNS, and nginx would refuse to start.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from ...errors import ConfigError
from .nginx import LISTEN
from .servers import MODELS, Runtime, Serving

DEFAULT_SUBNET = "10.213.77.0/24"
NGINX_IMAGE = "nginx:1.28-alpine"
_FIRST = 11


def addresses(subnet: str, count: int) -> tuple[str, ...]:
    """Return the addresses of the replicas.

    Raises:
        ConfigError: this is no private IPv4 subnet, or too small.
    """
    try:
        network = ipaddress.IPv4Network(subnet)
    except ValueError as error:
        raise ConfigError(
            f"--subnet {subnet}: {error}; expected such as {DEFAULT_SUBNET}"
        ) from None
    if not network.is_private:
        raise ConfigError(f"--subnet {subnet}: is not private; expected such as {DEFAULT_SUBNET}")
    if network.num_addresses < _FIRST + count + 1:
        raise ConfigError(f"--subnet {subnet}: is too small for {count} replicas")
    return tuple(str(network[_FIRST + k]) for k in range(count))


def compose(
    serving: Serving, run: Runtime, subnet: str, publish: str, memory: int | None
) -> dict[str, Any]:
    """Return the compose file.

    Args:
        serving: what is served.
        run: one server.
        subnet: of the network of replicas and balancer.
        publish: ``address:port`` of the host that the balancer answers at.
        memory: byte limit of a container that computes on the CPU.
    """
    services: dict[str, Any] = {}
    for k, address in enumerate(addresses(subnet, serving.replicas)):
        services[f"replica-{k + 1}"] = _replica(serving, run, address, k, memory)
    services["balancer"] = {
        "image": NGINX_IMAGE,
        "restart": "unless-stopped",
        "volumes": ["./nginx.conf:/etc/nginx/nginx.conf:ro"],
        "ports": [f"{publish}:{LISTEN}"],
        "depends_on": {
            name: {"condition": "service_started"} for name in services if name != "balancer"
        },
        "healthcheck": {
            "test": ["CMD", "wget", "-q", "-O", "-", f"http://127.0.0.1:{LISTEN}/balancer"],
            "interval": "10s",
            "timeout": "5s",
        },
        "security_opt": ["no-new-privileges:true"],
        "networks": {"serving": {}},
    }
    return {
        "name": serving.label,
        "services": services,
        "networks": {"serving": {"ipam": {"config": [{"subnet": subnet}]}}},
    }


def _replica(
    serving: Serving, run: Runtime, address: str, number: int, memory: int | None
) -> dict[str, Any]:
    service: dict[str, Any] = {
        "image": run.image,
        "restart": "unless-stopped",
        "init": True,
        "entrypoint": ["/bin/sh", "/deploy/start.sh"],
        "command": list(run.command),
        "volumes": [
            f"./models:{MODELS}:ro",
            "./models.sha256:/deploy/models.sha256:ro",
            "./start.sh:/deploy/start.sh:ro",
        ],
        "healthcheck": {
            "test": ["CMD", *run.health],
            "interval": "10s",
            "timeout": "10s",
            "retries": 3,
            "start_period": "30m",  # digests, then loading
        },
        "security_opt": ["no-new-privileges:true"],
        "networks": {"serving": {"ipv4_address": address}},
    }
    if run.environment:
        service["environment"] = dict(run.environment)
    if serving.gpus:
        first = number * serving.gpus
        wanted = {
            "driver": "nvidia",
            "device_ids": [str(first + k) for k in range(serving.gpus)],
            "capabilities": ["gpu"],
        }
        service["deploy"] = {"resources": {"reservations": {"devices": [wanted]}}}
        if serving.kind in ("vllm", "sglang"):
            service["ipc"] = "host"
    elif memory is not None:
        service["mem_limit"] = memory
    return service
