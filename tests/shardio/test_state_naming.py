"""Numbered optimizer states get names only where shapes leave one choice; torch is the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.shardio import open_checkpoint

torch = pytest.importorskip("torch")


class Net(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is optional
    """Buffers of any kind between parameters of unequal shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 5)
        self.register_buffer("mask", torch.ones(1, 4, 4))
        self.register_buffer("table", torch.arange(3))
        self.middle = torch.nn.Linear(5, 7)
        self.last = torch.nn.Linear(7, 2)

    def forward(self, x: Any) -> Any:
        return self.last(self.middle(self.first(x)))


def trained(folder: Path, model: Any, groups: list[list[Any]]) -> tuple[Path, Any]:
    optimizer = torch.optim.AdamW([{"params": g} for g in groups], lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    path = folder / "all.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path, optimizer


@pytest.mark.parametrize("frozen", [(), ("first",), ("middle",), ("first", "last")])
@pytest.mark.parametrize("split", [False, True])
def test_buffers_and_frozen_weights(tmp_path: Path, frozen: tuple[str, ...], split: bool) -> None:
    model = Net()
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    live = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [list(live.values())]
    if split:
        groups = [
            [p for p in live.values() if p.ndim > 1],
            [p for p in live.values() if p.ndim < 2],
        ]
    path, optimizer = trained(tmp_path, model, groups)
    found = open_checkpoint(path)
    assert set(found.optimizer["exp_avg"]) == set(live)
    for name, p in live.items():
        expected = optimizer.state[p]["exp_avg"].numpy()
        assert np.array_equal(found.optimizer["exp_avg"][name].read(), expected)


def test_equal_shapes_are_not_guessed(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
    model[1].requires_grad_(False)
    path, _ = trained(tmp_path, model, [[p for p in model.parameters() if p.requires_grad]])
    found = open_checkpoint(path)
    assert not found.optimizer and "numbered" in found.warnings[0]
