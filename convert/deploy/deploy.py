"""Put a deployment together: a folder with the model, its digests, and what starts the servers.

The folder appears whole or not at all. A model that cannot fit is refused before anything is
written.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, OutputError
from ...shardio.stream import Progress
from ..gguf import open_gguf
from ..ollama.build import Wishes
from ..ollama.facts import ModelFacts
from ..ollama.names import parse_name
from .compose import DEFAULT_SUBNET, addresses, compose
from .kubernetes import kubernetes
from .memory import MemoryPlan, plan_memory, refuse_what_cannot_fit
from .model_files import Placed, place, planned
from .nginx import nginx_conf
from .rpc import (
    Machine,
    Part,
    head_compose,
    layer_bytes,
    serve_line,
    split_layers,
    worker_compose,
)
from .servers import HF_KINDS, KindName, Runtime, Serving, runtime, start_script
from .yaml_text import to_yaml

DIGESTS = "models.sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployWishes:
    """What a user asked for.

    Attributes:
        kind: of server.
        name: what clients call the model; by default from the source.
        replicas: how many servers.
        context: tokens per slot, at most the model's own.
        slots: requests at once per server.
        gpus: per server.
        memory: bytes that one replica may use; None if not told.
        kubernetes: write manifests for Kubernetes too.
        machines: RPC servers that the layers are spread over.
        publish: ``address:port`` at which the balancer answers.
        subnet: of the containers.
        image: instead of the kind's own.
        quantize: type of the weights.
        modelfile: about Ollama's Modelfile.
        options: of the conversion, such as ``tokenizer``.
        force: replace an older deployment.
    """

    kind: KindName = "ollama"
    name: str | None = None
    replicas: int = 2
    context: int = 8192
    slots: int = 4
    gpus: int = 0
    memory: int | None = None
    kubernetes: bool = False
    machines: Sequence[Machine] = ()
    publish: str = "127.0.0.1:8080"
    subnet: str = DEFAULT_SUBNET
    image: str | None = None
    quantize: str | None = None
    modelfile: Wishes = field(default_factory=lambda: Wishes(source="model.gguf"))
    options: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What was written.

    Attributes:
        folder: of the deployment.
        files: what lies in it, without the model.
        serving: what is served.
        plan: of memory.
        line: the exact serve line of one replica.
        parts: of the pipeline, if there is one.
        digests: of the model's files.
        warnings: what a user should know.
    """

    folder: Path
    files: tuple[str, ...]
    serving: Serving
    plan: MemoryPlan
    line: tuple[str, ...]
    parts: tuple[Part, ...]
    digests: Mapping[str, str]
    warnings: tuple[str, ...]


def deploy(
    source: str | Path, folder: str | Path, wishes: DeployWishes, progress: Progress | None = None
) -> Deployed:
    """Write the folder of a deployment.

    Args:
        source: a GGUF file, or a checkpoint of any layout.
        folder: to be made.
        wishes: what is asked for.
        progress: called with (bytes done, bytes in all).

    Raises:
        ConfigError: wishes that contradict each other, or a replica that cannot fit.
        OutputError: the folder exists, or cannot be written.
        MconvError: the model cannot be converted.
    """
    model, target = Path(source), Path(folder)
    _check(wishes)
    _replaceable(target, wishes.force)
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}.mconv-part")
    try:
        done = _make(model, work, wishes, progress)
        if target.exists():
            shutil.rmtree(target)
        work.replace(target)
    except OSError as error:
        raise OutputError(f"{error.filename or target}: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return replace(done, folder=target)


def _make(model: Path, work: Path, wishes: DeployWishes, progress: Progress | None) -> Deployed:
    """Write everything into ``work``."""
    name = wishes.name or _name(model)
    parse_name(name)  # what is no name for Ollama is none for the others
    facts, size = planned(model, wishes.kind, wishes.quantize, wishes.options)
    context = min(wishes.context, facts.context_length or wishes.context)
    _plan(facts, size, context, wishes)  # refuse before anything is written
    (work / "models").mkdir(parents=True)
    modelfile = replace(wishes.modelfile, context=context)
    placed = place(
        model, work / "models", wishes.kind, name, wishes.quantize, modelfile,
        dict(wishes.options), progress,
    )  # fmt: skip
    plan = _plan(placed.facts, placed.weights, context, wishes)
    serving = Serving(
        kind=wishes.kind, name=name, label=label(name), file=placed.file,
        replicas=wishes.replicas, context=context, slots=wishes.slots, gpus=wishes.gpus,
        image=wishes.image,
    )  # fmt: skip
    run, parts = runtime(serving), _parts(placed, plan, wishes)
    texts = _texts(serving, run, placed, plan, parts, wishes)
    for path, text in texts.items():
        (work / path).parent.mkdir(exist_ok=True)
        (work / path).write_text(text, encoding="utf-8")
    return Deployed(
        folder=work, files=tuple(sorted(texts)), serving=serving, plan=plan, parts=parts,
        line=serve_line(serving, parts) if parts else run.command,
        digests=placed.digests, warnings=placed.warnings,
    )  # fmt: skip


def label(name: str) -> str:
    """Return a model's name as a DNS label, which begins with a letter."""
    text = re.sub(r"[^a-z0-9]+", "-", name.lower().removesuffix(":latest")).strip("-")
    text = f"m-{text}" if text[:1].isdigit() else text
    return text[:40].strip("-") or "model"


def _name(model: Path) -> str:
    """Return a name from the source's: characters that names may have, and no others."""
    stem = model.stem if model.is_file() else model.resolve().name
    text = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.")
    return text.lower() or "model"


def _check(wishes: DeployWishes) -> None:
    if wishes.machines and wishes.kind != "llama-server":
        raise ConfigError("--rpc spreads the layers of llama.cpp: it needs --kind llama-server")
    if wishes.machines and wishes.replicas != 1:
        raise ConfigError("--rpc makes one server of all machines: it needs --replicas 1")
    if wishes.machines and wishes.kubernetes:
        raise ConfigError("--rpc writes compose files, not Kubernetes manifests")
    if wishes.kind in HF_KINDS and wishes.quantize:
        raise ConfigError(f"-q {wishes.quantize}: {wishes.kind} takes weights as they are")
    addresses(wishes.subnet, wishes.replicas)
    host, _, port = wishes.publish.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--publish {wishes.publish}: is not ADDRESS:PORT")


def _replaceable(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not force:
        raise OutputError(f"{target}: exists; replace it with --force")
    if not (target / DIGESTS).is_file():
        raise OutputError(f"{target}: exists and is no deployment of mconv; name another folder")


def _plan(facts: ModelFacts, weights: int, context: int, wishes: DeployWishes) -> MemoryPlan:
    plan = plan_memory(
        facts, weights, context=context, slots=wishes.slots, replicas=wishes.replicas,
        limit=wishes.memory,
    )  # fmt: skip
    if not wishes.machines:
        refuse_what_cannot_fit(plan)
    return plan


def _parts(placed: Placed, plan: MemoryPlan, wishes: DeployWishes) -> tuple[Part, ...]:
    if not wishes.machines:
        return ()
    assert placed.gguf is not None
    layers = layer_bytes(open_gguf(placed.gguf))
    each = -(-plan.kv // max(len(layers) - 1, 1))
    return split_layers(layers, each, plan.work, wishes.machines)


def _texts(
    serving: Serving,
    run: Runtime,
    placed: Placed,
    plan: MemoryPlan,
    parts: Sequence[Part],
    wishes: DeployWishes,
) -> dict[str, str]:
    """Return the text of every file but the model's, by path."""
    script, sums = start_script(serving), placed.checksums()
    texts = {"start.sh": script, DIGESTS: sums}
    notes = [
        f"{serving.name} on {serving.replicas} x {serving.kind}; written by mconv deploy",
        f"one replica: {plan.weights} bytes of weights, {plan.kv} of keys and values "
        f"({serving.slots} slots of {serving.context} tokens), {plan.work} to compute (estimate)",
    ]
    if parts:
        line = serve_line(serving, parts)
        texts["nginx.conf"] = nginx_conf([f"{addresses(wishes.subnet, 1)[0]}:{run.port}"])
        head = head_compose(serving, line, wishes.subnet, wishes.publish)
        texts["compose.yaml"] = to_yaml([head], notes)
        for k, part in enumerate(parts):
            if part.layers:
                about = f"on {part.machine.address}: {part.layers} layers, {part.nbytes} bytes"
                worker = worker_compose(serving, part.machine)
                texts[f"worker-{k + 1}.yaml"] = to_yaml([worker], [about])
        return texts
    places = [f"{a}:{run.port}" for a in addresses(wishes.subnet, wishes.replicas)]
    texts["nginx.conf"] = nginx_conf(places)
    file = compose(serving, run, wishes.subnet, wishes.publish, wishes.memory)
    texts["compose.yaml"] = to_yaml([file], [*notes, "start: docker compose up -d"])
    if wishes.kubernetes:
        manifests = kubernetes(
            serving, run, sums, script, placed.weights, wishes.memory or plan.replica
        )
        for name, documents in manifests.items():
            texts[f"kubernetes/{name}.yaml"] = to_yaml(documents, notes)
    return texts
