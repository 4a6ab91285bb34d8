"""``mconv deploy MODEL``: replicas behind a balancer, checked by digest, with a memory plan."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from .modelfile import checkpoint_options, given, modelfile_options, wishes
from .options import Size, human, progress_bar, show_json, warn

if TYPE_CHECKING:
    from ..convert.deploy.deploy import Deployed
    from ..convert.deploy.rpc import Machine


class Worker(click.ParamType):
    """``HOST[:PORT]=SIZE``: a machine that runs llama.cpp's RPC server."""

    name = "machine"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value[0], value[1]
        address, found, size = str(value).partition("=")
        if not found:
            self.fail(f"{value!r} is not HOST[:PORT]=MEMORY, such as 10.0.0.2=24GiB", param, ctx)
        return address, Size().convert(size, param, ctx)


_OPTIONS = (
    click.option("-o", "--output", required=True, type=click.Path(), help="Folder to write."),
    click.option(
        "--kind",
        type=click.Choice(["ollama", "llama-server", "vllm", "sglang"]),
        default="ollama",
        show_default=True,
        help="Server.",
    ),
    click.option(
        "--replicas", type=click.IntRange(1, 200), help="Servers (default: 2; 1 with --rpc)."
    ),
    click.option(
        "--parallel",
        "slots",
        type=click.IntRange(1),
        default=4,
        show_default=True,
        help="Requests at once per server.",
    ),
    click.option(
        "--gpus", type=click.IntRange(0), help="GPUs per server (default: 0; 1 for vllm, sglang)."
    ),
    click.option("--memory", type=Size(), help="Memory of one replica; refuse what cannot fit."),
    click.option("--k8s", "kubernetes", is_flag=True, help="Write Kubernetes manifests too."),
    click.option(
        "--rpc",
        "workers",
        multiple=True,
        type=Worker(),
        help="HOST[:PORT]=MEMORY: spread the layers over such machines; repeatable.",
    ),
    click.option("--name", help="What clients call the model (default: from its file)."),
    click.option("-q", "--quantize", metavar="TYPE", help="Type of the weights, such as Q4_K_M."),
    click.option(
        "--imatrix",
        type=click.Path(exists=True),
        help="Importance matrix that guides the rounding.",
    ),
    click.option(
        "--publish",
        metavar="ADDRESS:PORT",
        default="127.0.0.1:8080",
        show_default=True,
        help="Where the balancer answers.",
    ),
    click.option(
        "--subnet", default="10.213.77.0/24", show_default=True, help="Of the containers."
    ),
    click.option("--image", help="Container image of the server."),
    click.option("--force", is_flag=True, help="Replace an older deployment."),
)


def _options(fn: Any) -> Any:
    for option in reversed(_OPTIONS):
        fn = option(fn)
    return fn


@click.command("deploy")
@click.argument("model", type=click.Path())
@_options
@modelfile_options
@checkpoint_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def command(model: str, output: str, as_json: bool, quiet: bool, **asked: Any) -> None:
    """Serve MODEL, a GGUF file or any checkpoint, from several replicas behind nginx.

    Writes a folder with the model (read-only, checked by digest when a replica starts), a compose
    file, nginx.conf and, with --k8s, Kubernetes manifests; prints the memory plan.

    \b
    mconv deploy model-Q4_K_M.gguf --replicas 3 --gpus 1 --memory 24GiB -o serve/
    mconv deploy runs/zero3 -q Q4_K_M --kind llama-server --k8s -o serve/
    mconv deploy big.gguf --kind llama-server --rpc 10.0.0.2=80GiB --rpc 10.0.0.3=80GiB -o serve/
    """
    from ..convert.deploy.deploy import DeployWishes, deploy

    machines = _machines(asked["workers"])
    hf = asked["kind"] in ("vllm", "sglang")
    with progress_bar("deploy", shown=not (quiet or as_json)) as progress:
        done = deploy(
            model,
            output,
            DeployWishes(
                kind=asked["kind"],
                name=asked["name"],
                replicas=asked["replicas"] or (1 if machines else 2),
                context=asked["context"] or 8192,
                slots=asked["slots"],
                gpus=int(hf) if asked["gpus"] is None else asked["gpus"],
                memory=asked["memory"],
                kubernetes=asked["kubernetes"],
                machines=machines,
                publish=asked["publish"],
                subnet=asked["subnet"],
                image=asked["image"],
                quantize=asked["quantize"],
                modelfile=wishes("model.gguf", asked),
                options=given(asked),
                force=asked["force"],
            ),
            progress,
        )
    if as_json:
        show_json(_as_dict(done))
    elif not quiet:
        _show(done, asked["publish"], asked["kubernetes"])


def _machines(workers: tuple[tuple[str, int], ...]) -> list[Machine]:
    from ..convert.deploy.rpc import parse_machine

    return [parse_machine(address, memory) for address, memory in workers]


def _as_dict(done: Deployed) -> dict[str, Any]:
    plan = done.plan
    return {
        "folder": done.folder,
        "files": done.files,
        "kind": done.serving.kind,
        "name": done.serving.name,
        "replicas": plan.replicas,
        "memory": {
            "weights": plan.weights,
            "kv": plan.kv,
            "work": plan.work,
            "replica": plan.replica,
            "total": plan.total,
            "context": plan.context,
            "slots": plan.slots,
            "limit": plan.limit,
        },
        "line": done.line,
        "parts": [
            {"machine": p.machine.address, "layers": p.layers, "bytes": p.nbytes}
            for p in done.parts
        ],
        "digests": done.digests,
        "warnings": done.warnings,
    }


def _show(done: Deployed, publish: str, kubernetes: bool) -> None:
    """One screen: what was written, the memory plan, what to do next."""
    plan, serving = done.plan, done.serving
    kv = f"{human(plan.kv)} of keys and values ({plan.slots} slots of {plan.context} tokens)"
    of = f" of {human(plan.limit)}" if plan.limit else ""
    rows = [
        ("wrote", f"{done.folder}: {', '.join(done.files)}"),
        ("model", f"{serving.name}, checked by the digests of models.sha256 at every start"),
        ("memory", f"{human(plan.weights)} of weights + {kv} + {human(plan.work)} to compute"),
    ]
    if done.parts:
        rows += [
            ("layers", f"{p.layers} on {p.machine.address}: {human(p.nbytes)}" if p.layers
             else f"none on {p.machine.address}: it is not needed")
            for p in done.parts
        ]  # fmt: skip
    else:
        total = f", {human(plan.total)} for {plan.replicas}"
        rows.append(("a replica", f"{human(plan.replica)}{of}{total}"))
    rows.append(("each runs", shlex.join(done.line)))
    for k, part in enumerate(done.parts):
        if part.layers:
            host = part.machine.address.rpartition(":")[0]
            start = (
                f"LLAMA_RPC_IMAGE=... RPC_BIND={host} docker compose -f worker-{k + 1}.yaml up -d"
            )
            rows.append((f"on {host}", start))
    rows.append(("next", f"cd {done.folder} && docker compose up -d, then http://{publish}"))
    if kubernetes:
        rows.append(("or", "kubectl apply -f kubernetes/storage.yaml; kubectl wait pod/"
                     f"{serving.label}-loader --for=condition=Ready; kubectl cp models/. "
                     f"{serving.label}-loader:/models; kubectl delete pod {serving.label}-loader; "
                     "kubectl apply -f kubernetes/serving.yaml"))  # fmt: skip
    for key, value in rows:
        click.echo(f"{key:>10}  {value}")
    warn(done.warnings)
