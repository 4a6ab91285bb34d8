"""``mconv plan MODEL``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .options import Size, human, render_options, show_json, warn

if TYPE_CHECKING:
    from ..convert.model_sizes import ModelSizes
    from ..trainer.planning.plan import Machines, TrainPlan
    from ..trainer.planning.plan_serving import ServeRow


_POOR = ("Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XS")  # not recommended where another fits


@click.command("plan")
@click.argument("model", type=click.Path(exists=True))
@click.option(
    "--config", type=click.Path(exists=True), help="config.json, if the checkpoint has none."
)
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="GPUs in all.")
@click.option("--memory", type=Size(), default="80GB", show_default=True, help="Memory of a GPU.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Machines.")
@click.option(
    "--interconnect",
    type=click.Choice(["fast", "slow"]),
    default="fast",
    show_default=True,
    help="Network between machines: InfiniBand or Ethernet.",
)
@click.option("--train/--serve", "train", default=None, help="Only training, or only serving.")
@click.option("--lora", is_flag=True, help="Train adapters only.")
@click.option("--seq-len", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--context", type=click.IntRange(1), default=8192, show_default=True)
@render_options
def command(
    model: str,
    config: str | None,
    gpus: int,
    memory: int,
    nodes: int,
    interconnect: str,
    train: bool | None,
    lora: bool,
    seq_len: int,
    context: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Recommend a parallel layout to train MODEL with, and a GGUF type to serve it as.

    MODEL is a config.json, a folder that has one, or a checkpoint of any format; no weight is read.

    \b
    mconv plan config.json --gpus 8 --memory 80GB
    mconv plan runs/zero3 --gpus 64 --nodes 8 --interconnect slow --train --seq-len 8192
    mconv plan model/ --memory 24GB --serve --context 32768
    """
    from ..convert.model_sizes import model_sizes
    from ..trainer.planning.plan import Machines, plan_training
    from ..trainer.planning.plan_serving import plan_serving

    sizes = model_sizes(model, config)
    machines = Machines(gpus=gpus, memory=memory, nodes=nodes, fast=interconnect == "fast")
    training = None if train is False else plan_training(sizes, machines, seq_len, lora)
    serving = [] if train else plan_serving(sizes, machines, context)
    if as_json:
        show_json(_json(sizes, training, serving, seq_len))
        return
    if quiet:
        return
    _line("model", f"{sizes.name}, {sizes.parameters:,} weights in {len(sizes.layers)} layers")
    _line("machines", f"{gpus} x {human(memory)}, of which {human(machines.usable)} are planned")
    if training is not None:
        _show_training(sizes, machines, training, seq_len)
    if serving:
        _show_serving(serving, context)


def _json(
    sizes: ModelSizes, training: TrainPlan | None, serving: list[ServeRow], seq_len: int
) -> dict[str, Any]:
    out: dict[str, Any] = {
        "architecture": sizes.name,
        "parameters": sizes.parameters,
        "largest_layer": max(sizes.layers),
        "rest": sizes.rest,
    }
    if training is not None:
        out["train"] = {**asdict(training), "toml": training.toml(seq_len)}
        assert training.memory is not None
        out["train"]["memory"]["total"] = training.memory.total
    if serving:
        out["serve"] = [asdict(row) for row in serving]
    return out


def _show_training(sizes: ModelSizes, machines: Machines, plan: TrainPlan, seq_len: int) -> None:
    assert plan.memory is not None
    found = plan.name if plan.fits else "nothing fits"
    click.echo()
    _line("train", click.style(found, bold=True) + f": {plan.why}" * plan.fits)
    if not plan.fits:
        _line("", f"the smallest layout, {plan.name}, is too large; try --lora, a shorter")
        _line("", "--seq-len, or more GPUs")
    parts = asdict(plan.memory)
    for name, size in parts.items():
        if size:
            _line("", f"{name:12} {human(size):>10}")
    tokens = f"for {plan.micro_batch} x {seq_len} tokens"
    _line("", f"{'of a GPU':12} {human(plan.memory.total):>10}  {tokens}")
    if plan.offload:
        needed = 16 * sizes.parameters // machines.nodes
        _line("", f"{'of a machine':12} {human(needed):>10}  of CPU memory")
    if plan.fits:
        click.echo()
        click.echo(plan.toml(seq_len), nl=False)
    warn(_untrainable(sizes))


def _untrainable(sizes: ModelSizes) -> tuple[str, ...]:
    from ..errors import ConfigError
    from ..trainer.settings.model import ModelConfig

    try:
        ModelConfig.from_hf(sizes.config)
    except ConfigError as error:
        return (f"mconv train does not have this model ({error}); the plan holds for others",)
    return ()


def _show_serving(rows: list[ServeRow], context: int) -> None:
    good = [row for row in rows if row.gpus and row.type not in _POOR]
    there = good or [row for row in rows if row.gpus]
    chosen = min(there, key=lambda row: row.gpus or 0, default=None)  # of these, the first
    click.echo()
    for row in rows:
        where = f"{row.gpus} GPU{'s' * (row.gpus > 1)}" if row.gpus else "too large"
        mark = "  <- recommended" if row is chosen else ""
        _line(
            "serve" if row is rows[0] else "",
            f"{row.type:8} {human(row.weights):>10}  with {context} tokens {human(row.total):>10}  "
            f"{where:9}  up to {row.context:,} tokens{mark}",
        )


def _line(name: str, text: str) -> None:
    click.echo(f"{click.style(name.rjust(9), bold=True)}  {text}")
