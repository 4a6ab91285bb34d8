"""An independent reader of Ollama's store, written from its layout alone; uses nothing of mconv."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

TYPES = {
    f"application/vnd.ollama.image.{kind}"
    for kind in ("model", "projector", "adapter", "template", "system", "params", "messages",
                 "license")
}  # fmt: skip


def read_store(root: Path) -> dict[str, dict]:
    """Validate a whole models folder; name to {layer kind: bytes, "config": dict, "id": text}."""
    models, used = {}, set()
    assert sorted(p.name for p in root.iterdir()) == ["blobs", "manifests"]
    files = [p for p in (root / "manifests").rglob("*") if p.is_file()]
    for path in files:
        parts = path.relative_to(root / "manifests").parts
        assert len(parts) == 4, parts
        raw = path.read_bytes()
        manifest = json.loads(raw)
        assert manifest["schemaVersion"] == 2
        assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
        config = manifest["config"]
        assert config["mediaType"] == "application/vnd.docker.container.image.v1+json"
        model: dict = {"id": hashlib.sha256(raw).hexdigest()[:12], "license": [], "kinds": []}
        model["config"] = json.loads(blob(root, config, used))
        for layer in manifest["layers"]:
            assert layer["mediaType"] in TYPES
            kind = layer["mediaType"].rsplit(".", 1)[1]
            data = blob(root, layer, used)
            model["kinds"].append(kind)
            if kind == "license":
                model[kind].append(data)
            else:
                assert kind not in model
                model[kind] = data
        assert model["model"][:4] == b"GGUF"
        models["/".join(parts[:3]) + ":" + parts[3]] = model
    stored = {p.name for p in (root / "blobs").iterdir()}
    assert stored == used, "blobs that no manifest names"
    return models


def blob(root: Path, layer: dict, used: set[str]) -> bytes:
    algorithm, digest = layer["digest"].split(":")
    assert algorithm == "sha256"
    path = root / "blobs" / f"sha256-{digest}"
    data = path.read_bytes()
    assert len(data) == layer["size"]
    assert hashlib.sha256(data).hexdigest() == digest
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    used.add(path.name)
    return data
