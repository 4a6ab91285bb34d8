"""An importance matrix of the model in training, for ``mconv quantize --imatrix``.

It holds, for each weight, the mean square of each of its input columns (each expert's own, in a
mixture), measured by running batches of the training data forward once more without gradients.
Layers run uncompiled and nothing is recomputed meanwhile, so every input counts once. Sums over
data, tensor, context, expert and pipeline ranks are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ...convert.imatrix_write import Measured, gguf_names, write_imatrix
from ..data import TokenData
from ..engine import all_sum
from ..hooks import Hook, Run
from ..mesh import DP, TOKENS
from ..metrics import StepMetrics
from ..model import Layer
from ..moe import Experts, Router, expert_names
from ..text.source import open_on_all

FILE = "imatrix.gguf"


class Collector:
    """Sums of squares and counts by the name of the weight; stacks of experts by theirs."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sums: dict[str, Tensor] = {}  # float64 [matrices, columns] each
        self.counts: dict[str, Tensor] = {}  # int64 [matrices] each
        self.rows = 0  # measured, over all ranks

    def measure(self, step: int, other: TokenData | None = None) -> None:
        """Measure on the batch of a step, or on that of other data; every rank calls this."""
        meshes, batch = self.run.state.meshes, self.run.config.train.batch
        source = self.run.data if other is None else other
        rows = source.batch(step, batch, meshes.rank(*DP), meshes.size(*DP))
        if not self.rows and meshes.size("pp") > 1:
            self.run.engine.evaluate(rows)  # the first time, stages also run to learn shapes
        with self._watching():
            self.run.engine.evaluate(rows)
        self.rows += batch

    def result(self) -> dict[str, Measured]:
        """Return everything by GGUF name, on all ranks; every rank calls this."""
        meshes = self.run.state.meshes
        group = meshes.group(*TOKENS)
        mine = {}
        for name in sorted(self.sums):
            sums, counts = all_sum(self.sums[name], group), all_sum(self.counts[name], group)
            mine[name] = Measured(sums.cpu().numpy(), counts.cpu().numpy())
        model = self.run.config.model
        names = gguf_names(model.to_hf())
        found = {}
        for name, measured in meshes.union(mine).items():
            first = (expert_names(model, name) or [name])[0]
            found[names[first][0]] = measured
        return found

    @contextmanager
    def _watching(self) -> Iterator[None]:
        layers = [
            (f"model.layers.{number}", layer)
            for part in self.run.state.parts
            for number, layer in part.model.layers.items()
            if isinstance(layer, Layer)
        ]
        bodies, handles = [layer.body for _, layer in layers], []
        for prefix, layer in layers:
            layer.body = layer.run
            for name, module in layer.named_modules(prefix=prefix):
                if isinstance(module, nn.Linear | Router):
                    handles.append(module.register_forward_pre_hook(partial(self._linear, name)))
                elif isinstance(module, Experts):
                    handles.append(module.register_forward_pre_hook(partial(self._experts, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for (_, layer), body in zip(layers, bodies, strict=True):
                layer.body = body

    def _linear(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        sums = x.double().square().sum(tuple(range(x.ndim - 1)))
        count = torch.tensor([x.numel() // x.shape[-1]], device=x.device)
        self._add(f"{name}.weight", _whole(sums)[None], count)

    def _experts(self, name: str, module: Experts, inputs: tuple[Tensor, ...]) -> None:
        """Experts get their tokens one run after the other (``moe.py``)."""
        x, counts = (one.detach() for one in inputs)
        meshes = self.run.state.meshes
        inner = module.inner(x, counts)
        owners = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
        first = meshes.rank("ep") * len(counts)
        every = counts.new_zeros(self.run.config.model.num_experts)
        every[first : first + len(counts)] = counts
        for leaf, values in (("gate_proj", x), ("up_proj", x), ("down_proj", inner)):
            sums = torch.zeros(len(every), values.shape[1], dtype=torch.float64, device=x.device)
            sums.index_add_(0, owners + first, values.double().square())
            if leaf == "down_proj" and meshes.size("tp") > 1:
                sums = DTensor.from_local(sums, meshes.sub("tp"), [Shard(1)]).full_tensor()
            self._add(f"{name}.{leaf}", sums, every)

    def _add(self, name: str, sums: Tensor, counts: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(sums)
            self.counts[name] = torch.zeros_like(counts)
        self.sums[name] += sums
        self.counts[name] += counts


class ImatrixHook(Hook):
    """Collects as ``[imatrix]`` says and writes ``imatrix.gguf`` into the run's folder."""

    def __init__(self) -> None:
        self._collector: Collector | None = None
        self._other: TokenData | None = None

    def start(self, run: Run) -> None:
        """Begin with nothing measured; open other data if they are to be measured."""
        wanted = run.config.imatrix
        self._collector = Collector(run) if wanted.every or wanted.at_end else None
        if wanted.at_end and wanted.tokens is not None:
            self._other = open_on_all(run.config, wanted.tokens)

    def step(self, run: Run, metrics: StepMetrics) -> None:
        """Measure the step's batch when it is time."""
        every = run.config.imatrix.every
        if self._collector is not None and every and metrics.step % every == 0:
            self._collector.measure(metrics.step - 1)

    def stop(self, run: Run) -> None:
        """Measure the last batches, and write."""
        if self._collector is None:
            return
        if run.config.imatrix.at_end:
            first = 0 if self._other is not None else run.state.step
            for step in range(first, first + run.config.imatrix.batches):
                self._collector.measure(step, self._other)
        found = self._collector.result()
        if run.first and found:
            write_imatrix(
                run.config.save.folder / FILE,
                found,
                datasets=[(run.config.imatrix.tokens or run.config.data.tokens).name],
                chunks=self._collector.rows,
                chunk_size=run.config.train.seq_len,
            )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
