"""Megatron-LM's legacy format: every fixture against the truth, layouts written here by the book,
and every way of breaking a checkpoint that must be refused.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mconv.convert.naming import to_hf
from mconv.shardio.compare import check_replicas
from mconv.shardio.coverage import prove
from mconv.shardio.registry import open_checkpoint

from .megatron_cases import check_truth, copy_of, values
from .megatron_writer import Model, Plan, make_model, rank_model, write_legacy

CASES = [
    "core019_llama_tied_tp2pp2",
    "deepseek_tp2ep2",
    "gpt2_tp2pp2",
    "llama_legacy_tp2pp2",
    "llama_tied_tp2pp2",
    "llama_tp1pp1",
    "llama_tp2pp2",
    "llama_tp2pp2_vpp2",
    "llama_tp4_gqa2",
    "mixtral_ep2",
    "mixtral_grouped_tp2ep2",
    "mixtral_tp2ep2_etp1",
    "opt_dist_tp2dp2",
    "opt_fp32_tp2",
    "qwen2_bias_tp2",
    "qwen3moe_tp2ep2pp2",
    "te_names_llama_tied_tp2pp2",
]
FILE = "model_optim_rng.pt"


@pytest.fixture
def base(fixtures_dir: Path) -> Path:
    return fixtures_dir / "megatron"


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a fixture; returns its iteration folder."""
    return lambda case: copy_of(base / case, "torch", tmp_path) / "iter_0000010"


# -- the fixtures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("derived", [False, True], ids=["config given", "config derived"])
@pytest.mark.parametrize("case", CASES)
def test_fixture_is_read_exactly(base: Path, case: str, derived: bool) -> None:
    ckpt = open_checkpoint(base / case / "torch")
    assert ckpt.format == "megatron"
    assert ckpt.config is not None
    check_truth(replace(ckpt, config=None) if derived else ckpt, base / case)


@pytest.mark.parametrize("case", CASES)
def test_layout_is_recognised(base: Path, case: str) -> None:
    told = json.loads((base / case / "case.json").read_text())
    layout = open_checkpoint(base / case / "torch").layout
    assert (layout.tp, layout.pp, layout.vpp) == (told["tp"], told["pp"], told["vpp"])
    assert (layout.ep, layout.etp or layout.tp) == (told["ep"], told["etp"] or told["tp"])


@pytest.mark.parametrize("case", CASES)
def test_derived_config_agrees_with_the_real_one(base: Path, case: str) -> None:
    ckpt = replace(open_checkpoint(base / case / "torch"), config=None)
    derived = to_hf(ckpt, vocab_size=317).config
    real = json.loads((base / case / "config.json").read_text())
    real["torch_dtype"] = "bfloat16" if "fp32" not in case and "tp1pp1" not in case else "float32"
    real |= real.pop("rope_parameters", {})
    skip = {"partial_rotary_factor", "architectures", "n_ctx", "head_dim", "n_inner"}
    assert derived is not None
    for key in set(derived) & set(real) - skip:
        assert derived[key] == real[key], key


@pytest.mark.parametrize("case", ["llama_tied_tp2pp2", "mixtral_grouped_tp2ep2", "opt_dist_tp2dp2"])
def test_opening_imports_no_framework(base: Path, case: str) -> None:
    code = (
        "import sys; from mconv.shardio.registry import open_checkpoint; "
        "from mconv.convert.naming import to_hf; "
        f"c = to_hf(open_checkpoint({str(base / case / 'torch')!r}), vocab_size=317); "
        "[t.read() for t in c.weights.values()]; "
        "bad = {'torch', 'megatron', 'transformers', 'deepspeed'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_paths_that_people_type(base: Path) -> None:
    run = base / "llama_tp2pp2" / "torch"
    iteration = run / "iter_0000010"
    for path in (run, iteration, iteration / "mp_rank_01_000", iteration / "mp_rank_00_001" / FILE):
        assert open_checkpoint(path).path == iteration


# -- layouts that no fixture has -------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    tp, pp, vpp = (draw(st.sampled_from(s)) for s in ((1, 2, 4), (1, 2, 3), (1, 1, 2)))
    vpp = vpp if pp > 1 else 1
    moe = draw(st.booleans())
    ep = draw(st.sampled_from((1, 2, 4))) if moe else 1
    etp = draw(st.sampled_from([n for n in (1, 2, 4) if n <= tp])) if moe else None
    counts = draw(st.lists(st.integers(1, 2), min_size=pp * vpp, max_size=pp * vpp))
    return Plan(tp, pp, vpp, ep, etp, tuple(counts), 4 if moe else 0, draw(st.booleans()))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans())
def test_any_layout_comes_back(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    folder = tmp_path_factory.mktemp("run")
    model = make_model(plan)
    ckpt = open_checkpoint(write_legacy(folder, model, plan))
    prove(ckpt.weights)
    check_replicas(ckpt.weights, ckpt.replicas)
    assert set(ckpt.weights) == set(model)
    for name, expected in model.items():
        assert np.array_equal(values(ckpt.weights[name]), expected.numpy()), name
    for name, axes in ckpt.placements.items():  # what was cut can be cut again
        for axis, placement in axes.items():
            if axis in ("tp", "etp"):
                world = plan.tp if axis == "tp" else plan.expert_tp
                parts = [placement.cut(ckpt.weights[name], r, world) for r in range(world)]
                again = placement.assemble(parts)
                assert np.array_equal(values(again), model[name].numpy())
    shutil.rmtree(folder)


def grouped_linear(model: Model) -> Model:
    """TEGroupedMLP: one module, numbered weights."""
    return {
        re.sub(r"local_experts\.(\d+)\.(\w+)\.weight", r"\2.weight\1", name): t
        for name, t in model.items()
    }


def grouped_old(model: Model) -> Model:
    """GroupedMLP: (hidden, experts * rows) declared, (experts, hidden, rows) in memory."""
    out = {n: t for n, t in model.items() if "local_experts" not in n}
    layers = {n.split(".local_experts")[0] for n in model if "local_experts" in n}
    for at in layers:
        for which in "12":
            own = [t for n, t in model.items() if n.startswith(at) and f"fc{which}" in n]
            stacked = torch.stack([t.T for t in own]).contiguous()
            hidden = own[0].shape[1 if which == "1" else 0]
            shape = (hidden, -1) if which == "1" else (-1, hidden)
            out[f"{at}.weight{which}"] = stacked.reshape(shape)
    return out


def with_extra_states(model: Model) -> dict[str, object]:
    out: dict[str, object] = {f"module.{n}": t for n, t in model.items()}
    return out | {
        "module.decoder.layers.0.self_attention.core_attention._extra_state": torch.zeros(3),
        "module.decoder.layers.0.mlp.linear_fc1._extra_state": None,
        "module.rotary_pos_emb.inv_freq": torch.zeros(1),
    }


@pytest.mark.parametrize("respell", [grouped_linear, grouped_old, with_extra_states])
def test_other_spellings(tmp_path: Path, respell: Callable[[Model], dict[str, object]]) -> None:
    plan = Plan(tp=2, ep=2, etp=2, experts=4)
    model = make_model(plan)
    ckpt = open_checkpoint(write_legacy(tmp_path, model, plan, respell))
    assert set(ckpt.weights) == set(model)
    for name, expected in model.items():
        assert np.array_equal(values(ckpt.weights[name]), expected.numpy()), name


def test_bare_state_dicts_of_nemo(tmp_path: Path) -> None:
    """``tp_rank_*_pp_rank_*/model_weights.ckpt``: no args, the sizes are in the names."""
    plan = Plan(tp=2, pp=2, counts=(1, 1))
    model = make_model(plan)
    for t, p in ((0, 0), (1, 0), (0, 1), (1, 1)):
        folder = tmp_path / f"tp_rank_{t:02d}_pp_rank_{p:03d}"
        folder.mkdir()
        chunk = rank_model(model, plan, t, p, 0, 0)
        torch.save({f"model.{n}": x for n, x in chunk.items()}, folder / "model_weights.ckpt")
    ckpt = open_checkpoint(tmp_path)
    assert (ckpt.layout.tp, ckpt.layout.pp) == (2, 2)
    assert set(ckpt.weights) == set(model)
    for name, expected in model.items():
        assert np.array_equal(values(ckpt.weights[name]), expected.numpy()), name


@pytest.mark.parametrize("version", [0, 1.0])
def test_old_qkv_orders(tmp_path: Path, version: float) -> None:
    """Version 0 has [3, heads, d] rows on every rank, version 1 [heads, d, 3]."""
    plan = Plan(tp=2)
    model = make_model(plan)

    def respell(chunk: Model) -> Model:
        out = dict(chunk)
        for name, t in chunk.items():
            if "linear_qkv" in name:
                view = t.reshape(2, 3, 2, -1)  # heads of a rank, q/k/v, head dim
                order = (1, 0, 2, 3) if version == 0 else (0, 2, 1, 3)
                out[name] = view.permute(order).reshape(t.shape).contiguous()
        return out

    root = write_legacy(tmp_path, model, plan, respell, lambda _: {"checkpoint_version": version})
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert np.array_equal(values(open_checkpoint(root).weights[name]), model[name].numpy())


def test_mamba_and_latent_projections_are_cut_in_parts(tmp_path: Path) -> None:
    heads, dim, groups, state = 4, 2, 2, 4
    inner = heads * dim
    widths = (inner, inner, groups * state, groups * state, heads)
    plan = Plan(
        tp=2,
        counts=(1,),
        args={"mamba_head_dim": dim, "mamba_state_dim": state, "mamba_num_groups": groups},
    )
    model = make_model(plan)
    at = "decoder.layers.0."
    whole = {
        f"{at}mixer.in_proj.weight": torch.randn(sum(widths), 8),
        f"{at}mixer.conv1d.weight": torch.randn(sum(widths[1:4]), 1, 4),
        f"{at}mixer.A_log": torch.randn(heads),
        f"{at}mixer.out_proj.weight": torch.randn(8, inner),
        f"{at}self_attention.linear_kv_down_proj.weight": torch.randn(6, 8),
        f"{at}self_attention.linear_kv_up_proj.weight": torch.randn(8, 6),
    }
    ranks = iter((0, 1))

    def respell(chunk: Model) -> Model:
        r = next(ranks)

        def parts(t: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
            return torch.cat([p.chunk(2)[r] for p in t.split(sizes)])

        mine = dict(whole)
        mine[f"{at}mixer.in_proj.weight"] = parts(whole[f"{at}mixer.in_proj.weight"], widths)
        conv = f"{at}mixer.conv1d.weight"
        mine[conv] = parts(whole[conv], widths[1:4])
        mine[f"{at}mixer.A_log"] = whole[f"{at}mixer.A_log"].chunk(2)[r].clone()
        out = f"{at}mixer.out_proj.weight"
        mine[out] = whole[out].chunk(2, 1)[r].clone()
        up = f"{at}self_attention.linear_kv_up_proj.weight"
        mine[up] = whole[up].chunk(2)[r].clone()
        return chunk | mine

    ckpt = open_checkpoint(write_legacy(tmp_path, model, plan, respell))
    for name, expected in whole.items():
        assert np.array_equal(values(ckpt.weights[name]), expected.numpy()), name
    assert f"{at}self_attention.linear_kv_down_proj.weight" in ckpt.replicas


# -- optimizers that no fixture has ----------------------------------------------------------------


def chained(models: list[Model], experts: bool) -> list[str]:
    """Parameter names in the order of the optimizer's indices: decayed ones first."""
    names = [
        (v, n)
        for v, m in enumerate(models)
        for n in m
        if experts is None or ("experts" in n) == experts
    ]
    decayed = [x for x in names if models[x[0]][x[1]].ndim > 1]
    return decayed + [x for x in names if x not in decayed]


def plain_optimizer(models: list[Model], order: list[tuple[int, str]]) -> dict[str, object]:
    """Float16OptimizerWithFloat16Params: masters are the weights plus 1, exp_avg times 2."""
    tensors = [models[v][n].float() for v, n in order]
    cut = sum(t.ndim > 1 for t in tensors)
    groups = [list(range(cut)), list(range(cut, len(tensors)))]
    return {
        "optimizer": {
            "state": {
                i: {"step": 3, "exp_avg": t * 2, "exp_avg_sq": t * t} for i, t in enumerate(tensors)
            },
            "param_groups": [
                {"params": groups[0], "wd_mult": 1.0, "lr": 0.1},
                {"params": groups[1], "wd_mult": 0.0, "lr": 0.1},
            ],
        },
        "fp32_from_fp16_params": [[tensors[i] + 1 for i in g] for g in groups],
    }


def to_half(model: Model) -> Model:
    return {n: t.bfloat16() for n, t in model.items()}


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "chained with experts"])
def test_plain_mixed_precision_optimizer(tmp_path: Path, experts: int) -> None:
    plan = Plan(tp=2, pp=2, vpp=2, ep=2 if experts else 1, counts=(1, 2, 1, 1), experts=experts)
    model = {n: t.bfloat16().float() for n, t in make_model(plan).items()}

    def extra(chunks: list[Model]) -> dict[str, object]:
        kinds = [False, True] if experts else [None]
        saved = [plain_optimizer(chunks, chained(chunks, k)) for k in kinds]
        return {"optimizer": saved if experts else saved[0]}

    ckpt = open_checkpoint(write_legacy(tmp_path, model, plan, to_half, extra))
    assert not ckpt.warnings
    for name, t in model.items():
        assert np.array_equal(values(ckpt.optimizer["exp_avg"][name]), (t * 2).numpy()), name
        assert np.array_equal(values(ckpt.optimizer["exp_avg_sq"][name]), (t * t).numpy()), name
        assert np.array_equal(values(ckpt.optimizer["master"][name]), (t + 1).numpy()), name
    assert ckpt.scalars["param_groups"][0] == {"wd_mult": 1.0, "lr": 0.1, "step": 3}


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "with experts"])
def test_distributed_optimizer_of_chunks_and_experts(tmp_path: Path, experts: int) -> None:
    """One flat buffer per chunk and kind, parameters in reverse, starts at multiples of 64."""
    plan = Plan(tp=2, pp=2, vpp=2, ep=2 if experts else 1, counts=(1, 2, 1, 1), experts=experts)
    model = {n: t.bfloat16().float() for n, t in make_model(plan).items()}
    root = write_legacy(tmp_path, model, plan, to_half, lambda _: {"optimizer": {"optimizer": {}}})

    def buffer(chunk: Model, kind: bool) -> dict[object, object]:
        flat = torch.zeros(0)
        for name in [n for n in chunk if ("experts" in n) == kind][::-1]:
            flat = torch.cat([flat, torch.zeros(-len(flat) % 64), chunk[name].flatten()])
        data = {"param": flat + 1, "exp_avg": flat * 2, "exp_avg_sq": flat * flat}
        return {(torch.bfloat16, torch.float32): data | {"numel_unpadded": len(flat)}}

    for folder in root.iterdir():
        t, p, *e = (int(x) for x in folder.name.split("_")[2:])
        chunks = [rank_model(model, plan, t, p, v, e[0] if e else 0) for v in range(2)]
        saved = [
            {"buckets_coalesced": True} | {v: buffer(c, kind) for v, c in enumerate(chunks)}
            for kind in ([False, True] if experts else [False])
        ]
        torch.save(saved if experts else saved[0], folder / "distrib_optim.pt")
    ckpt = open_checkpoint(root)
    assert not ckpt.warnings
    for name, t in model.items():
        assert np.array_equal(values(ckpt.optimizer["exp_avg"][name]), (t * 2).numpy()), name
        assert np.array_equal(values(ckpt.optimizer["master"][name]), (t + 1).numpy()), name


def test_unreadable_optimizer_is_left_out_with_a_reason(base: Path, copied: Callable) -> None:
    root = copied("opt_dist_tp2dp2")
    (root / "mp_rank_01" / "distrib_optim.pt").unlink()
    ckpt = open_checkpoint(root)
    assert not ckpt.optimizer
    assert "mp_rank_01" in ckpt.warnings[0]
    assert len(ckpt.weights) == 15
