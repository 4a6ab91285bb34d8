"""A real Megatron-Core run on the CPU: loads checkpoints, writes their logits.

Run by ``test_megatron_real.py`` with a JSON list of jobs as argument. Builds ``GPTModel`` from
local modules as the saved args say, loads strictly (``load_state_dict`` or
``dist_checkpointing.load``), and sends activations through the pipeline by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from argparse import Namespace
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from torch.overrides import TorchFunctionMode


def start(args: Namespace) -> None:
    """Build Megatron's groups."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )


def config_of(args: Namespace) -> TransformerConfig:
    """The model that the saved args describe."""
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.layernorm_epsilon,
        normalization=args.normalization,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=getattr(args, "add_qkv_bias", False),
        qk_layernorm=getattr(args, "qk_layernorm", False),
        num_moe_experts=args.num_experts,
        moe_ffn_hidden_size=getattr(args, "moe_ffn_hidden_size", None),
        moe_router_topk=getattr(args, "moe_router_topk", None) or 2,
        moe_layer_freq=args.moe_layer_freq,
        moe_router_load_balancing_type=getattr(args, "balancing", "aux_loss"),
        moe_token_dispatcher_type="allgather",
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=args.decoder_last_pipeline_num_layers,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        attention_softmax_in_fp32=True,
    )


def build(args: Namespace) -> list[GPTModel]:
    """The model chunks of this rank."""
    config = config_of(args)
    vpp = args.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for chunk in range(vpp):
        stage = chunk if vpp > 1 else None
        model = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=args.rotary_base,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            parallel_output=True,
            pre_process=parallel_state.is_pipeline_first_stage(False, stage),
            post_process=parallel_state.is_pipeline_last_stage(False, stage),
            vp_stage=stage,
        )
        chunks.append(model.eval())
    return chunks


def load_legacy(chunks: list[GPTModel], root: dict[str, Any]) -> None:
    """Strictly, as ``load_checkpoint`` does."""
    for k, model in enumerate(chunks):
        model.load_state_dict(root["model" if len(chunks) == 1 else f"model{k}"], strict=True)


def load_dist(chunks: list[GPTModel], folder: Path) -> None:
    """Through ``dist_checkpointing.load``, nothing missing or left over."""
    content = dist_checkpointing.load_content_metadata(str(folder))
    sharded = {
        "model" if len(chunks) == 1 else f"model{k}": m.sharded_state_dict(metadata=content)
        for k, m in enumerate(chunks)
    }
    state, missing, unexpected = dist_checkpointing.load(sharded, str(folder), strict="return_all")
    left = {key for key in unexpected if not key.startswith("optimizer.")}
    assert not missing and not left, (missing, left)
    load_legacy(chunks, state)


@torch.no_grad()
def logits_of(chunks: list[GPTModel], tokens: torch.Tensor) -> torch.Tensor | None:
    """Forward through the pipeline; the whole logits on ranks of the last stage."""
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    before = parallel_state.get_pipeline_model_parallel_prev_rank()
    after = parallel_state.get_pipeline_model_parallel_next_rank()
    positions = torch.arange(tokens.shape[1])[None]
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    out = None
    for k, model in enumerate(chunks):
        if not model.pre_process:
            hidden = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size)
            dist.recv(hidden, before)
            model.set_input_tensor(hidden)
        out = model(tokens, positions, mask)
        if not (stage == pp - 1 and k == len(chunks) - 1):
            dist.send(out.contiguous(), after)
    if stage < pp - 1:
        return None
    assert out is not None
    return gather_from_tensor_model_parallel_region(out)


def rank_folder(args: Namespace) -> str:
    """``mp_rank_...`` of this process."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if args.pipeline_model_parallel_size > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if args.expert_model_parallel_size > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return name


def run(job: dict[str, Any]) -> None:
    """Load one checkpoint and save its logits, or the losses of further training."""
    folder = Path(job["folder"])
    legacy = job["format"] == "megatron"
    first = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))[0] if legacy else None
    args = torch.load(first or folder / "common.pt", weights_only=False)["args"]
    for key, value in job["sizes"].items():  # the run that loads may be cut differently
        setattr(args, key, value)
    start(args)
    chunks = build(args)
    tokens = torch.tensor([job["tokens"]])
    own = folder / rank_folder(args)
    if "steps" in job:
        result: Any = train(job, args, chunks[0], own if legacy else folder, tokens)
    else:
        if legacy:
            load_legacy(chunks, torch.load(own / "model_optim_rng.pt", weights_only=False))
        else:
            load_dist(chunks, folder)
        result = logits_of(chunks, tokens)
    if result is not None and dist.get_rank() == dist.get_world_size() - 1:
        torch.save(result, job["out"])
    dist.barrier()
    parallel_state.destroy_model_parallel()


def train(
    job: dict[str, Any], args: Namespace, model: GPTModel, folder: Path, tokens: torch.Tensor
) -> list[float]:
    """Resume with the optimizer and train on; returns the losses."""
    zero = args.use_distributed_optimizer
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=zero), model
    )
    settings = OptimizerConfig(
        optimizer="adam", lr=0.5, weight_decay=0.3, clip_grad=0.0, use_distributed_optimizer=zero
    )  # what is wrong here must come out of the checkpoint
    optimizer = get_megatron_optimizer(settings, [ddp])
    if job["format"] == "megatron":
        root = torch.load(folder / "model_optim_rng.pt", weights_only=False)
        model.load_state_dict(root["model"], strict=True)
        if job["optimizer"]:
            optimizer.load_state_dict(root["optimizer"])
            if zero:
                optimizer.load_parameter_state(str(folder / "distrib_optim.pt"))
    else:
        step(ddp, optimizer, tokens)  # torch's Adam makes its state in the first step
        content = dist_checkpointing.load_content_metadata(str(folder))
        content["distrib_optim_fully_reshardable_mem_efficient"] = True  # gathers through gloo
        whole = model.sharded_state_dict(metadata=content)
        state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=content)}
        state["optimizer"] = optimizer.sharded_state_dict(whole, is_loading=True, metadata=content)
        state = dist_checkpointing.load(state, str(folder))
        model.load_state_dict(state["model"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
    own_steps(optimizer)
    if not job["optimizer"]:
        optimizer.reload_model_params()
        for group in optimizer.param_groups:
            group["lr"] = job["lr"]
    return [step(ddp, optimizer, tokens) for _ in range(job["steps"])]


def step(ddp: Any, optimizer: Any, tokens: torch.Tensor) -> float:
    """One update; returns the loss before it."""
    length = tokens.shape[1] - 1
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    positions = torch.arange(length)[None]
    loss = ddp(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
    loss.backward()
    ddp.finish_grad_sync()
    optimizer.step()
    return loss.item()


def own_steps(optimizer: Any) -> None:
    """Core 0.16 loads one step tensor for all parameters; torch's Adam counts it up for each."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in one.optimizer.state.values():
            state["step"] = state["step"].clone()


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what Megatron asks a GPU for."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def patch() -> None:
    """Let core 0.16 run on the CPU, with torch's own Adam and without Transformer Engine."""
    # dropout asks for CUDA's random states even when it drops nothing
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_, **__: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    names = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
    torch.Tensor.type = lambda self, dtype=None: self.to(dtype) if dtype else names[self.dtype]
    moe_utils.te_general_gemm = None  # forgotten where Transformer Engine is missing
    place = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        """Forgotten: torch's own Adam has a step, which ``load_state_dict`` has set."""
        with torch.no_grad():  # fp32 parameters are their own masters
            known = self._get_main_param_and_optimizer_states(parameter)["step"].clone()
            place(self, parameter, {"step": known, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step


def rank_main(rank: int, world: int, jobs: list[dict[str, Any]]) -> None:
    """One rank of the group."""
    limit = timedelta(seconds=240)  # no rank waits longer for one that does not answer
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=limit)
    patch()
    with OnCpu():
        for job in jobs:
            run(job)


def main() -> None:
    """Run all jobs in one group of ``WORLD_SIZE`` processes, forked so that all import once."""
    world, jobs = int(os.environ["WORLD_SIZE"]), json.loads(sys.argv[1])
    fork = get_context("fork")
    ranks = [fork.Process(target=rank_main, args=(r, world, jobs)) for r in range(world)]
    for process in ranks:
        process.start()
    left = {process.sentinel: process for process in ranks}
    while left:
        for sentinel in wait(list(left)):
            if left.pop(sentinel).exitcode:
                for process in ranks:  # they would wait for the one that failed
                    process.kill()
                sys.exit(1)


if __name__ == "__main__":
    main()
