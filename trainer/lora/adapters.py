"""LoRA: which layers get updates, and adapters in PEFT's format.

What is saved can be read by ``peft`` and merged by ``mconv --adapter``; what ``peft`` saved can be
trained further.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...errors import ConfigError, FormatError
from ..hooks import Hook, Run
from ..init import fill
from ..model import Decoder, Layer
from ..settings import RunConfig
from ..settings.sections import LoraConfig
from ..state import TrainState
from .dropout import RowDropout, Rows
from .linear import LoraLinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def add_adapters(part: Decoder, config: LoraConfig, seed: int) -> None:
    """Freeze a model part and give its target layers updates, in place.

    Raises:
        ConfigError: a target that no layer of the model is called.
    """
    part.requires_grad_(False)
    found, rows = set(), Rows(part.model.context)
    for layer in part.model.layers.values():
        assert isinstance(layer, Layer)
        layer.rows = rows
    for name, module in list(part.model.layers.named_modules(prefix="model.layers")):
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and leaf in config.targets:
            found.add(leaf)
            module.__class__ = LoraLinear
            assert isinstance(module, LoraLinear)
            dropout = RowDropout(config.dropout, f"{seed}:{name}", rows) if config.dropout else None
            module.adapt(config, dropout)
    missing = sorted(set(config.targets) - found)
    if missing:
        linear = {n.rpartition(".")[2] for n, m in part.named_modules() if isinstance(m, nn.Linear)}
        raise ConfigError(
            f"lora.targets: no linear layer of the model is called {missing[0]!r}; there are "
            f"{', '.join(sorted(linear - {'lm_head'}))}"
        )


def adapted(part: Decoder) -> Iterator[tuple[str, LoraLinear]]:
    """Yield names and layers that have updates."""
    for name, module in part.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def save_adapter(folder: Path, config: RunConfig, state: TrainState) -> None:
    """Write the adapter into ``folder`` as PEFT does; every rank calls this, rank 0 writes."""
    from safetensors.torch import save_file

    mine: dict[str, Tensor] = {}
    for part in state.parts:
        for name, layer in adapted(part):
            for kind in ("lora_A", "lora_B"):
                weight = getattr(layer, kind).weight.detach()
                whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
                mine[f"{_PREFIX}{name}.{kind}.weight"] = whole.cpu().contiguous()
    tensors = state.meshes.union(mine)
    if state.meshes.world.get_rank() == 0:
        part_folder = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(part_folder, ignore_errors=True)
        part_folder.mkdir(parents=True)
        save_file(dict(sorted(tensors.items())), part_folder / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(peft_config(config), indent=2)
        (part_folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part_folder.replace(folder)
    dist.barrier()


def peft_config(config: RunConfig) -> dict[str, object]:
    """Return ``adapter_config.json``."""
    base = config.model.init_from
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if base is not None else None,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "use_rslora": config.lora.rslora,
        "target_modules": sorted(config.lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def load_adapter(part: Decoder, folder: Path) -> None:
    """Fill a part's updates from a PEFT adapter with the same settings, in place.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """
    from safetensors import safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        raise FormatError(f"{path}: is not there: {folder} is no adapter of PEFT")
    with torch.no_grad(), safe_open(path, "pt") as file:
        names = set(file.keys())
        for name, layer in adapted(part):
            for kind in ("lora_A", "lora_B"):
                key = f"{_PREFIX}{name}.{kind}.weight"
                weight = getattr(layer, kind).weight
                shape = file.get_slice(key).get_shape() if key in names else None
                if shape is None or tuple(shape) != tuple(weight.shape):
                    has = "is missing" if shape is None else f"is {list(shape)}"
                    raise FormatError(
                        f"{path}: {key} {has}, the run's is {list(weight.shape)}; lora.rank and "
                        "lora.targets must be those of the adapter"
                    )
                tensor = file.get_tensor(key)
                fill(weight, lambda _, tensor=tensor: tensor)  # type: ignore[misc]  # this turn's


class LoraHook(Hook):
    """Starts from a given adapter, and writes one into the run's folder at the end."""

    def start(self, run: Run) -> None:
        """Load ``lora.init_from``, unless the run goes on from a checkpoint of its own."""
        first = run.config.lora.init_from
        if run.config.lora.rank and first is not None and not run.state.step:
            for part in run.state.parts:
                load_adapter(part, first)

    def stop(self, run: Run) -> None:
        """Save the adapter as ``adapter``."""
        if run.config.lora.rank:
            save_adapter(run.config.save.folder / "adapter", run.config, run.state)
