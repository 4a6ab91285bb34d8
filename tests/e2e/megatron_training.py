"""Megatron-Core trains, saves, resumes on four CPU ranks: the cases of ``test_resume_megatron``.

    torchrun --nproc-per-node 4 megatron_training.py FOLDER OUT.json [CASE...]

Each case trains under A from the Hugging Face model in FOLDER (its optimizer is Megatron's own),
saves in the middle and goes on (the truth); rank 0 reshards what was saved, and B resumes from it,
once more with zeroed moments. The model, optimizer, pipeline schedule and states are
megatron-core's; only the container of the legacy format, which belongs to Megatron's training
scripts, is written here as they do.
"""

from __future__ import annotations

import copy
import json
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mconv import Layout, reshard

sys.path.insert(0, str(Path(__file__).parent.parent / "shardio" / "writers"))

import megatron_process as core
from hf_deepspeed import ADAM, BATCH, DECAY, LENGTH, VOCAB, batch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

MIDDLE, END = 3, 7


@dataclass(frozen=True)
class Case:
    """One line of the matrix.

    Attributes:
        model: folder name of the starting point.
        layouts: A, then what its checkpoint becomes; each but the last saves and goes on.
        last: layout that is written only, for another framework to resume.
    """

    model: str
    layouts: tuple[str, ...]
    last: str | None = None


CASES = {
    "tp2 to pp2 to tp2 pp2 vpp2": Case(
        "llama", ("megatron:tp=2", "megatron:pp=2", "megatron:tp=2,pp=2,vpp=2")
    ),
    "distributed optimizer, tp2 to pp2": Case(
        "llama", ("megatron:tp=2,zero_stage=1", "megatron:pp=2,zero_stage=1")
    ),
    "torch_dist, pp2 to tp4": Case(
        "llama", ("megatron-dist:pp=2,zero_stage=1", "megatron-dist:tp=4,zero_stage=1")
    ),
    "experts, ep2 to tp2": Case("mixtral", ("megatron:ep=2", "megatron:tp=2")),
    "megatron to zero-3": Case("llama", ("megatron:tp=2,pp=2",), "deepspeed:zero=3,dp=2"),
}


@dataclass
class Run:
    """A model with its optimizer under one layout."""

    args: Namespace
    layout: Layout
    chunks: list[Any] = field(init=False)
    ddp: list[Any] = field(init=False)
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        core.start(self.args)
        # nothing is dropped; in training mode experts under tp demand sequence parallelism, which
        # the local norms do not have
        self.chunks = [m.eval() for m in core.build(self.args)]
        zero = self.layout.zero_stage == 1
        config = DistributedDataParallelConfig(use_distributed_optimizer=zero)
        self.ddp = [DistributedDataParallel(m.config, config, m) for m in self.chunks]
        model = self.chunks[0].config
        model.finalize_model_grads_func = finalize_model_grads
        if len(self.chunks) > 1:  # two stages would mix up what they send to each other in a batch
            model.overlap_p2p_comm, model.batch_p2p_comm = True, False
        settings = OptimizerConfig(
            optimizer="adam", lr=ADAM["lr"], weight_decay=DECAY, clip_grad=0.0,
            adam_beta2=ADAM["betas"][1], use_distributed_optimizer=zero,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(settings, self.ddp)
        for group in self.optimizer.param_groups:  # as its scheduler does before the first step
            group["weight_decay"] *= group["wd_mult"]

    def close(self) -> None:
        """Let go of the groups."""
        dist.barrier()
        parallel_state.destroy_model_parallel()

    def step(self, number: int) -> float:
        """One update; returns the loss over the global batch before it."""
        dp = parallel_state.get_data_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank()
        rows = batch(number)[rank * BATCH // dp : (rank + 1) * BATCH // dp]
        for model in self.ddp:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()

        def forward(rows: Any, model: Any) -> Any:
            tokens = next(rows)
            out = model(tokens[:, :-1], torch.arange(LENGTH)[None], mask, labels=tokens[:, 1:])
            return out, lambda out: (out.mean(), {"loss": out.detach().mean()})

        iterators = [iter(rows.split(1)) for _ in self.ddp]
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.ddp if len(self.ddp) > 1 else self.ddp[0],
            num_microbatches=len(rows),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        for name, parameter in (p for m in self.chunks for p in m.named_parameters()):
            if ".experts." in name:  # without sequence parallelism each tp rank adds all tokens
                parameter.main_grad /= self.layout.tp
        self.optimizer.step()
        total = torch.tensor(sum(float(one["loss"]) for one in found) / len(rows))
        dist.all_reduce(total)
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        return float(total) * stages / dist.get_world_size()

    # -- files ----------------------------------------------------------------------------------

    def save(self, folder: Path, step: int) -> None:
        """As Megatron's ``save_checkpoint`` does."""
        args = copy.copy(self.args)
        args.iteration, args.consumed_train_samples = step, step * BATCH
        args.use_distributed_optimizer = self.layout.zero_stage == 1
        place = folder / f"iter_{step:07d}"
        common = {"args": args, "checkpoint_version": 3.0, "iteration": step}
        common["num_floating_point_operations_so_far"] = 0
        if self.layout.format == "megatron-dist":
            self._save_dist(place, common)
        else:
            self._save_legacy(place, common)
        if dist.get_rank() == 0:
            (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
        dist.barrier()

    def _save_legacy(self, place: Path, root: dict[str, Any]) -> None:
        own = place / core.rank_folder(self.args)
        own.mkdir(parents=True, exist_ok=True)
        if self.layout.zero_stage == 1:
            self.optimizer.save_parameter_state(str(own / "distrib_optim.pt"))
        if parallel_state.get_expert_data_parallel_rank() == 0:
            many = len(self.chunks) > 1
            for k, model in enumerate(self.chunks):
                state = model.state_dict_for_save_checkpoint()
                root[f"model{k}" if many else "model"] = state
            root["optimizer"] = self.optimizer.state_dict()
            torch.save(root, own / "model_optim_rng.pt")
        dist.barrier()

    def _save_dist(self, place: Path, state: dict[str, Any]) -> None:
        content = {"distrib_optim_sharding_type": "fully_reshardable"}
        content |= {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        content["distrib_optim_fully_reshardable_mem_efficient"] = True
        state |= self._sharded(content, loading=False)
        if dist.get_rank() == 0:
            place.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(state, str(place), content_metadata=content)

    def _sharded(self, content: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        many = len(self.chunks) > 1
        models = {
            f"model{k}" if many else "model": m.sharded_state_dict(metadata=content)
            for k, m in enumerate(self.chunks)
        }
        optimizer = self.optimizer.sharded_state_dict(models, is_loading=loading, metadata=content)
        return {**copy.deepcopy(models), "optimizer": optimizer} if loading else {
            **models, "optimizer": optimizer
        }  # fmt: skip

    def load(self, folder: Path) -> None:
        """Strictly, with the optimizer."""
        if self.layout.format == "megatron":
            own = folder / core.rank_folder(self.args)
            root = torch.load(own / "model_optim_rng.pt", weights_only=False)
            core.load_legacy(self.chunks, root)
            self.optimizer.load_state_dict(root["optimizer"])
            if self.layout.zero_stage == 1:
                self.optimizer.load_parameter_state(str(own / "distrib_optim.pt"))
        else:
            self.step(0)  # torch's Adam makes its state in the first step
            content = dist_checkpointing.load_content_metadata(str(folder))
            content["distrib_optim_fully_reshardable_mem_efficient"] = True
            state = dist_checkpointing.load(self._sharded(content, loading=True), str(folder))
            core.load_legacy(self.chunks, state)
            self.optimizer.load_state_dict(state["optimizer"])
        core.own_steps(self.optimizer)

    def start(self, folder: Path) -> None:
        """From bare weights."""
        if self.layout.format == "megatron":
            own = folder / core.rank_folder(self.args) / "model_optim_rng.pt"
            core.load_legacy(self.chunks, torch.load(own, weights_only=False))
        else:
            core.load_dist(self.chunks, folder)
        self.optimizer.reload_model_params()

    def forget(self) -> None:
        """Zero the moments: what a lost optimizer does."""
        for one in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for state in one.optimizer.state.values():
                for value in state.values():
                    value.zero_()


def saved_args(folder: Path, layout: Layout) -> Namespace:
    """The args of a checkpoint."""
    if layout.format == "megatron":
        file = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))[0]
    else:
        file = folder / "common.pt"
    args: Namespace = torch.load(file, weights_only=False)["args"]
    args.balancing = "none"
    return args


def convert(source: Path, target: Path, text: str) -> Path:
    """Reshard on rank 0; returns the folder of rank files."""
    if dist.get_rank() == 0:
        extra = ",transformer_impl=local,make_vocab_divisible_by=1" if "megatron" in text else ""
        reshard(source, target, Layout.parse(text + extra), vocab_size=VOCAB)
    dist.barrier()
    found = [p for p in target.iterdir() if p.is_dir()]
    return found[0]


def run_case(case: Case, models: Path, work: Path) -> dict[str, Any]:
    """Losses: of the uninterrupted first run, and of each layout that took over."""
    texts = case.layouts
    layouts = [Layout.parse(t) for t in texts]
    end = MIDDLE + (END - MIDDLE) * max(1, len(layouts) - 1)
    folder = convert(models / case.model, work / "start", texts[0])
    run = Run(saved_args(folder, layouts[0]), layouts[0])
    run.start(folder)
    truth = []
    for number in range(end):
        if number == MIDDLE:
            run.save(work / "saved0", number)
        truth.append(run.step(number))
    run.close()
    found: dict[str, Any] = {"truth": truth, "resumed": [], "control": []}
    for k, layout in enumerate(layouts[1:]):
        folder = convert(work / f"saved{k}", work / f"made{k}", texts[k + 1])
        first = MIDDLE + k * (END - MIDDLE)
        last = first + END - MIDDLE
        for key in ("control", "resumed"):
            run = Run(saved_args(folder, layout), layout)
            run.load(folder)
            if key == "control":
                run.forget()
            found[key] += [run.step(n) for n in range(first, last)]
            if key == "resumed" and k + 2 < len(layouts):
                run.save(work / f"saved{k + 1}", last)
            run.close()
    if case.last:
        convert(work / "saved0", work / "last", case.last)
        found["last"] = str(work / "last")
    return found


def main() -> None:
    """All cases in one group of processes."""
    models, out, *names = sys.argv[1:]
    dist.init_process_group("gloo")
    core.patch()
    torch.set_num_threads(1)
    results = {}
    with core.OnCpu():
        for k, name in enumerate(names or CASES):
            results[name] = run_case(CASES[name], Path(models), Path(out).parent / f"case{k}")
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
