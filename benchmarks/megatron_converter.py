"""Megatron-LM's own ``tools/checkpoint/convert.py`` on a machine without a GPU, as a peer.

    python benchmarks/megatron_converter.py MEGATRON_LM SOURCE TARGET TP

MEGATRON_LM is its source tree at tag core_v0.14.0, the last one whose converter builds GPT models
(later ones drop the model builder: ``model_provider() missing ... 'model_builder'``); it imports
the package six. The source must have the names of ``--transformer-impl local``. The conversion is
Megatron's, loader and saver processes, queue and files; what is put in their place here:

* answers of ``torch.cuda`` about a device, its random state, and tensors of counters put there;
* the version of transformer-engine that the saver asks for and does not use;
* fused kernels are not compiled, and three options that choose kernels are turned off;
* a gloo group of one process and the groups missing beside it, as later tags do: without them the
  sizes given for tensor parallelism are ignored.
"""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

OPTIONS = ["--no-rope-fusion", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm"]
GROUPS = (
    "_DATA_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP_WITH_CP", "_EXPERT_DATA_PARALLEL_GROUP",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP", "_PIPELINE_MODEL_PARALLEL_GROUP",
)  # fmt: skip


def without_cuda() -> None:
    """Let torch answer for a device that is not there."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.get_rng_state = torch.get_rng_state
    cuda.get_device_properties = lambda *_: SimpleNamespace(major=8, minor=0)
    make, load = torch.tensor, torch.load

    def tensor(*values: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return make(*values, device="cpu" if device == "cuda" else device, **options)

    torch.tensor = tensor
    # written for torch before 2.6, where this was the default; SOURCE is our own
    torch.load = lambda *a, **options: load(*a, **{"weights_only": False, **options})


def without_transformer_engine() -> None:
    """Let the saver find a version; the modules that are built are the local ones."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        return "2.0.0" if name == "transformer-engine" else real(name)

    importlib.metadata.version = version


def patch(plugin: Any) -> None:
    """Change what a loader or saver asks of Megatron."""
    build, initialize = plugin.build_sys_argv, plugin.initialize_megatron_env

    def build_sys_argv(self: Any) -> list[str]:
        return [*build(self), *OPTIONS]

    def initialize_megatron_env(self: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
        )
        initialize(self)
        from megatron.core import mpu
        from utils import _ConverterFakeProcessGroup

        for name in GROUPS:
            if getattr(mpu, name, None) is None:
                setattr(mpu, name, _ConverterFakeProcessGroup(size=1))

    plugin.build_sys_argv = build_sys_argv
    plugin.initialize_megatron_env = initialize_megatron_env


def main() -> None:
    """Run the converter."""
    megatron, source, target, tp = sys.argv[1:]
    tools = Path(megatron) / "tools" / "checkpoint"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # which Megatron asks for
    sys.path[:0] = [megatron, str(tools)]
    without_cuda()
    without_transformer_engine()
    import loader_core
    import saver_core
    from megatron.legacy import fused_kernels

    fused_kernels.load = lambda _: None
    patch(loader_core.MegatronCheckpointLoaderLLM)
    patch(saver_core.MegatronCheckpointSaverLLM)
    sys.argv = [
        str(tools / "convert.py"), "--model-type", "GPT", "--loader", "core", "--saver", "core",
        "--load-dir", source, "--save-dir", target, "--megatron-path", megatron,
        "--loader-transformer-impl", "local", "--saver-transformer-impl", "local",
        "--position-embedding-type", "rope", "--target-tensor-parallel-size", tp,
    ]  # fmt: skip
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
