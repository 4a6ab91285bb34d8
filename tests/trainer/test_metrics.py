"""What a run tells: files, evaluations, work per token, curves."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from mconv.cli import cli  # noqa: E402
from mconv.errors import ConfigError, TrainError  # noqa: E402
from mconv.trainer.data import TokenData  # noqa: E402
from mconv.trainer.loop import new_run, run_steps  # noqa: E402
from mconv.trainer.measure.eval import validation_loss  # noqa: E402
from mconv.trainer.measure.plot import panels, plot, svg, ticks  # noqa: E402
from mconv.trainer.mesh import build_meshes, process_group  # noqa: E402
from mconv.trainer.metrics import (  # noqa: E402
    Evaluation,
    Follower,
    LogHook,
    MetricsWriter,
    StepMetrics,
    read_evaluations,
    read_metrics,
)
from mconv.trainer.planning.flops import flops_per_token, peak_flops  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402
from mconv.trainer.settings.sections import EvalConfig, LogConfig, SaveConfig  # noqa: E402
from mconv.trainer.text.token_file import TokenFile  # noqa: E402

from .ranks import Ranks  # noqa: E402
from .toys import ToyData, plain_model, run_config  # noqa: E402


def line(step: int, loss: float = 2.5) -> StepMetrics:
    return StepMetrics(step, loss, 1e-3, 0.5, 100.0, 0.1)


def test_files_and_what_a_resume_takes_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(line(step))
            writer.evaluated(Evaluation(step, 2.0, 10, "a", "b\n\N{SNOWMAN}"))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')  # cut off by a crash
    assert [m.step for m in read_metrics(tmp_path)] == [1, 2, 3]
    told: list[Any] = []
    with MetricsWriter(tmp_path, after=2, sinks=(lambda *a: told.append(a),)) as writer:
        writer.write(line(3, 9.0))
        writer.evaluated(Evaluation(3, 8.0))
    assert [m.loss for m in read_metrics(tmp_path)] == [2.5, 2.5, 9.0]
    assert [(e.step, e.loss) for e in read_evaluations(tmp_path)] == [(1, 2.0), (2, 2.0), (3, 8.0)]
    assert read_evaluations(tmp_path)[0].sample == "b\n\N{SNOWMAN}"
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"], row["mfu"]) for row in rows][-1] == ("3", "9.0", "")
    numbers = {k: v for k, v in asdict(line(3, 9.0)).items() if k != "step" and v is not None}
    assert told == [(3, numbers), (3, {"eval_loss": 8.0})]


@pytest.mark.parametrize("model", ["dense", "gqa", "moe"])
def test_work_per_token_is_what_torch_counts(model: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = run_config(model)
    decoder = plain_model(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        ids = torch.arange(24).reshape(3, 8)
        decoder(ids).sum().backward()
    per_token = counter.get_total_flops() / 24
    assert flops_per_token(config.model, 8) == pytest.approx(per_token, rel=1e-12)


def test_frozen_weights_are_less_work() -> None:
    from mconv.trainer.lora.adapters import add_adapters
    from mconv.trainer.settings.sections import LoraConfig
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = run_config("dense")
    decoder = plain_model(config)
    add_adapters(decoder, LoraConfig(rank=1, targets=("q_proj",)), 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(torch.arange(24).reshape(3, 8)).sum().backward()
    per_token = counter.get_total_flops() / 24
    assert flops_per_token(config.model, 8, frozen=True) == pytest.approx(per_token, rel=0.08)


def test_peaks_of_devices() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Some CPU") is None


def logged(rank: int, world_size: int, store: Path, folder: Path, nan_at: int = 0) -> str:
    """Train two steps with a log; a loss that is no number can be put in."""
    config = run_config(train={"steps": 3})
    config = replace(config, save=SaveConfig(folder=folder), log=LogConfig(every=2))
    with process_group(rank, world_size, store):
        run = new_run(config, build_meshes(resolve(config, world_size), "cpu"), ToyData(config))
        log = LogHook()
        if nan_at:
            inner = run.engine.train

            def train(batch: Any) -> Any:
                loss, tokens = inner(batch)
                return loss * (math.nan if run.state.step + 1 == nan_at else 1), tokens

            run.engine = SimpleNamespace(train=train)  # type: ignore[assignment]  # all it needs
        try:
            run_steps(run, [log])
        except TrainError as error:
            return str(error)
    return ""


def test_a_run_is_logged(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(logged, 2, tmp_path) == ["", ""]
    metrics = read_metrics(tmp_path)
    assert [m.step for m in metrics] == [2, 3]  # every second, and the last
    for m in metrics:
        work = flops_per_token(run_config().model, 8)
        assert m.tflops == pytest.approx(m.tokens_per_s * work / 2 / 1e12)
        assert (m.mfu, (m.memory or 0) > 1 << 20) == (None, True)


def test_a_loss_that_is_no_number_ends_the_run(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks(logged, 2, tmp_path, 1):
        assert said.startswith("step 1: the loss is nan; go on from an earlier checkpoint")
    assert [m.step for m in read_metrics(tmp_path)] == [1]  # though only every second is due


def evaluated(rank: int, world_size: int, store: Path, batches: int, layout: Any) -> Any:
    config = replace(run_config(**layout), eval=EvalConfig(every=1, prompt="x", batches=batches))
    with process_group(rank, world_size, store):
        run = new_run(config, build_meshes(resolve(config, world_size), "cpu"), ToyData(config))
        return validation_loss(run, valid())


def valid() -> TokenData:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 61, 93).astype(np.uint16)
    starts = np.array([0, 30, 37, 70])
    return TokenData(TokenFile(Path("v"), tokens, starts), seq_len=8, seed=0)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True, "loss_parallel": True}, {"pp": 2}])
def test_validation_counts_every_row_once(ranks: Ranks, layout: dict[str, Any]) -> None:
    rows = valid().in_order(0, 16)
    assert (rows.labels[12:] == -100).all()
    assert (rows.labels[11] != -100).sum() == 4
    model = plain_model(run_config())
    with torch.no_grad():
        logits = model(rows.inputs, rows.positions, rows.documents)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels.flatten())
    for loss, tokens in ranks(evaluated, 2, 0, layout):
        assert tokens == 93 - 4
        assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert ranks(evaluated, 2, 1, layout)[0][1] < 64


def test_takers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mconv.trainer.measure.sinks import sinks

    told: list[Any] = []
    run = SimpleNamespace(log=lambda numbers, step: told.append((step, numbers)))
    fake = ModuleType("wandb")
    fake.init = lambda **_: run  # type: ignore[attr-defined]
    board = ModuleType("torch.utils.tensorboard")
    scalars: list[Any] = []
    writer = SimpleNamespace(add_scalar=lambda *a: scalars.append(a))
    board.SummaryWriter = lambda _: writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    config = replace(run_config(), log=LogConfig(to=("wandb", "tensorboard")))
    for put in sinks(config):
        put(3, {"loss": 2.0})
    assert (told, scalars) == ([(3, {"loss": 2.0})], [("loss", 2.0, 3)])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        sinks(config)


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(2.1, 9.7) == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert ticks(3.0, 3.0)[0] <= 3.0 <= ticks(3.0, 3.0)[-1]
    assert ticks(0.0, 0.0)[0] <= 0.0 <= ticks(0.0, 0.0)[-1]


def test_curves(tmp_path: Path) -> None:
    for name in ("one", "a<b"):
        (tmp_path / name).mkdir()
        with MetricsWriter(tmp_path / name) as writer:
            for step in range(1, 3001):
                writer.write(line(step, 100.0 if step == 1234 else 5 / step))
            writer.evaluated(Evaluation(3000, 0.5))
    drawn = panels([tmp_path / "one", tmp_path / "a<b" / "metrics.jsonl"])
    assert [p.title for p in drawn] == ["loss", "tokens/s", "learning rate", "gradient norm"]
    assert [c.name for c in drawn[0].curves] == [
        "one",
        "one validation",
        "a<b",
        "a<b validation",
    ]
    assert len(drawn[0].curves[0].points) <= 1200
    assert (1234.0, 100.0) in drawn[0].curves[0].points  # a spike is never thinned away
    root = ElementTree.fromstring(svg(drawn))
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 10
    for one in lines:
        for pair in one.get("points").split():
            x, y = (float(v) for v in pair.split(","))
            assert 0 <= x <= float(root.get("width"))
            assert 0 <= y <= float(root.get("height"))
    done = CliRunner().invoke(
        cli, ["plot", str(tmp_path / "one"), "--json"], catch_exceptions=False
    )
    assert json.loads(done.stdout)["runs"] == {str(tmp_path / "one"): 3000}
    assert (tmp_path / "one" / "curves.svg").read_text().startswith("<svg")


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        plot([tmp_path], tmp_path / "a.svg")
    with MetricsWriter(tmp_path) as writer:
        writer.write(line(1, math.nan))
    assert "polyline" in svg(panels([tmp_path]))
    with pytest.raises(ConfigError, match=r"as \.svg or \.png"):
        plot([tmp_path], tmp_path / "a.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ConfigError, match="drawing PNG needs matplotlib"):
        plot([tmp_path], tmp_path / "a.png")


def test_lines_are_told_once_as_they_appear(tmp_path: Path) -> None:
    told: list[int] = []
    follow = Follower(tmp_path, lambda metrics: told.append(metrics.step))
    follow()
    with MetricsWriter(tmp_path) as writer:
        writer.write(StepMetrics(1, 2.0, 0.1, 1.0, 10.0, 0.1))
        follow()
        writer.write(StepMetrics(2, 1.5, 0.1, 1.0, 10.0, 0.1))
        writer.write(StepMetrics(3, 1.25, 0.1, 1.0, 10.0, 0.1))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, ')
        follow()
        follow()
    assert told == [1, 2, 3]
    with MetricsWriter(tmp_path, after=1) as writer:  # a resumed run writes the file anew
        follow()
        writer.write(StepMetrics(2, 123456.5, 0.1, 1.0, 10.0, 0.1))
        follow()
    assert told == [1, 2, 3, 1, 2]
