"""Kubernetes manifests: a StatefulSet of replicas, each checking the digests when it starts.

Every replica has a Service of its own, whose address does not change when its pod does, so that
nginx counts requests per replica (a plain Service would spread them blindly).
"""

from __future__ import annotations

from typing import Any

from .compose import NGINX_IMAGE
from .nginx import LISTEN, nginx_conf
from .servers import MODELS, Runtime, Serving

_POD = "statefulset.kubernetes.io/pod-name"


def kubernetes(
    serving: Serving, run: Runtime, digests: str, script: str, storage: int, memory: int
) -> dict[str, list[dict[str, Any]]]:
    """Return manifests by file name: ``storage`` (and a pod to fill it) and ``serving``.

    Args:
        serving: what is served.
        run: one server.
        digests: the text of models.sha256.
        script: the text of start.sh.
        storage: bytes of the model on disk.
        memory: bytes that a replica needs.
    """
    names = [f"{serving.label}-{k}" for k in range(serving.replicas)]
    conf = nginx_conf([f"{name}:{run.port}" for name in names])
    files = {"models.sha256": digests, "start.sh": script}
    return {
        "storage": [_claim(serving, storage), _loader(serving)],
        "serving": [
            _config(f"{serving.label}-files", serving, files),
            _config(f"{serving.label}-balancer", serving, {"nginx.conf": conf}),
            _service(
                serving.label + "-replicas", serving, _labels(serving), run.port, headless=True
            ),
            *(_service(n, serving, {_POD: n}, run.port) for n in names),
            _stateful_set(serving, run, memory),
            _disruptions(serving),
            _balancer(serving),
            _service(serving.label, serving, _labels(serving, "balancer"), LISTEN),
        ],
    }


def _labels(serving: Serving, part: str = "replica") -> dict[str, str]:
    return {"app.kubernetes.io/name": serving.label, "app.kubernetes.io/component": part}


def _object(kind: str, version: str, name: str, serving: Serving, **body: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": serving.label}
    return {
        "apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}, **body,
    }  # fmt: skip


def _config(name: str, serving: Serving, files: dict[str, str]) -> dict[str, Any]:
    return _object("ConfigMap", "v1", name, serving, data=files)


def _service(
    name: str, serving: Serving, selector: dict[str, str], port: int, headless: bool = False
) -> dict[str, Any]:
    spec: dict[str, Any] = {"selector": selector, "ports": [{"name": "http", "port": port}]}
    if headless:
        spec["clusterIP"] = "None"
    return _object("Service", "v1", name, serving, spec=spec)


def _claim(serving: Serving, storage: int) -> dict[str, Any]:
    size = f"{storage * 11 // 10 // 2**20 + 64}Mi"
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": size}}}
    name = f"{serving.label}-models"
    return _object("PersistentVolumeClaim", "v1", name, serving, spec=spec)


def _loader(serving: Serving) -> dict[str, Any]:
    """A pod that holds the volume while ``kubectl cp`` fills it."""
    spec = {
        "restartPolicy": "Never",
        "containers": [
            {
                "name": "loader",
                "image": "busybox:1.37",
                "command": ["sleep", "infinity"],
                "volumeMounts": [{"name": "models", "mountPath": MODELS}],
            }
        ],
        "volumes": [_volume(serving, read_only=False)],
    }
    return _object("Pod", "v1", f"{serving.label}-loader", serving, spec=spec)


def _volume(serving: Serving, read_only: bool = True) -> dict[str, Any]:
    claim: dict[str, Any] = {"claimName": f"{serving.label}-models"}
    if read_only:
        claim["readOnly"] = True
    return {"name": "models", "persistentVolumeClaim": claim}


def _stateful_set(serving: Serving, run: Runtime, memory: int) -> dict[str, Any]:
    labels = _labels(serving)
    container: dict[str, Any] = {
        "name": "server",
        "image": run.image,
        "command": ["/bin/sh", "/deploy/start.sh", *run.command],
        "env": [{"name": key, "value": value} for key, value in run.environment.items()],
        "ports": [{"name": "http", "containerPort": run.port}],
        "resources": _resources(serving, memory),
        "startupProbe": _probe(run, failures=360),  # an hour for digests and loading
        "readinessProbe": _probe(run, failures=2),
        "livenessProbe": _probe(run, failures=6),
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS, "readOnly": True},
            {"name": "files", "mountPath": "/deploy", "readOnly": True},
        ],
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    if not run.environment:
        del container["env"]
    pod = {
        "terminationGracePeriodSeconds": 120,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": [
            _volume(serving),
            {"name": "files", "configMap": {"name": f"{serving.label}-files"}},
        ],
    }
    spec = {
        "serviceName": f"{serving.label}-replicas",
        "replicas": serving.replicas,
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return _object("StatefulSet", "apps/v1", serving.label, serving, spec=spec)


def _resources(serving: Serving, memory: int) -> dict[str, Any]:
    if serving.gpus:
        return {"limits": {"nvidia.com/gpu": serving.gpus}}
    size = f"{-(-memory // 2**20)}Mi"
    return {"requests": {"memory": size}, "limits": {"memory": size}}


def _probe(run: Runtime, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": run.path, "port": "http"},
        "periodSeconds": 10,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _disruptions(serving: Serving) -> dict[str, Any]:
    selector = {"matchLabels": _labels(serving)}
    spec = {"maxUnavailable": 1, "selector": selector}
    return _object("PodDisruptionBudget", "policy/v1", serving.label, serving, spec=spec)


def _balancer(serving: Serving) -> dict[str, Any]:
    labels = _labels(serving, "balancer")
    probe = {"httpGet": {"path": "/balancer", "port": "http"}, "periodSeconds": 5}
    container = {
        "name": "nginx",
        "image": NGINX_IMAGE,
        "ports": [{"name": "http", "containerPort": LISTEN}],
        "readinessProbe": probe,
        "livenessProbe": probe,
        "volumeMounts": [
            {
                "name": "conf", "mountPath": "/etc/nginx/nginx.conf", "subPath": "nginx.conf",
                "readOnly": True,
            }
        ],
    }  # fmt: skip
    pod = {
        "containers": [container],
        "volumes": [{"name": "conf", "configMap": {"name": f"{serving.label}-balancer"}}],
    }
    spec = {
        # one, because least_conn counts only the requests that pass through it
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return _object("Deployment", "apps/v1", f"{serving.label}-balancer", serving, spec=spec)
