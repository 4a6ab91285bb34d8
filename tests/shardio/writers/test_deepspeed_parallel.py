"""DeepSpeed's model parallelism: stages of a pipeline, AutoTP's cuts, refusals, nearest sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mconv import Checkpoint, Layout, open_checkpoint, reshard
from mconv.errors import LayoutError, MconvError, UnsupportedError
from mconv.shardio.deepspeed.pipe_stages import balanced, choose_bounds, read_layers, uniform
from mconv.shardio.tensor import LazyTensor

from .families import family

PLAIN, MEGATRON = "deepspeed/pp2_dp2_z1_bf16", "deepspeed/pp2_tp2_dp2_z1_meg"


def same(a: LazyTensor, b: LazyTensor) -> bool:
    return a.shape == b.shape and a.read().tobytes() == b.read().tobytes()


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    """Weights, masters and moments, bit for bit."""
    assert a.weights.keys() == b.weights.keys()
    assert all(same(t, b.weights[n]) for n, t in a.weights.items())
    assert a.optimizer.keys() == b.optimizer.keys()
    for state, tensors in a.optimizer.items():
        assert tensors.keys() == b.optimizer[state].keys()
        assert all(same(t, b.optimizer[state][n]) for n, t in tensors.items())


@pytest.mark.parametrize(
    ("case", "text", "stages"),
    [
        (PLAIN, "pp=1,dp=2", [range(6)]),
        (PLAIN, "pp=2,dp=3", [range(3), range(3, 6)]),
        (PLAIN, "pp=3,pp_layers=1+2+3", [range(1), range(1, 3), range(3, 6)]),
        (PLAIN, "pp=6,dp=2", [[n] for n in range(6)]),
        (MEGATRON, "pp=1,dp=4", [range(6)]),
        (MEGATRON, "pp=1,tp=4", [range(6)]),
        (MEGATRON, "pp=3,tp=2,dp=2", None),
    ],
)
def test_a_pipeline_comes_back_from_any_layout(
    fixtures_dir: Path, tmp_path: Path, case: str, text: str, stages: list[range] | None
) -> None:
    source = open_checkpoint(fixtures_dir / case / "ckpt")
    report = reshard(source, tmp_path / "out", Layout.parse(f"deepspeed:zero=1,{text}"))
    found = open_checkpoint(tmp_path / "out")
    assert_same(source, found)
    assert found.naming == source.naming
    assert (found.step, found.scalars["lr_scheduler"]) == (3, source.scalars["lr_scheduler"])
    before, after = (c.scalars["param_groups"] for c in (source, found))
    assert [{*g["params"]} for g in after] == [{*g["params"]} for g in before]
    if stages is not None:
        assert found.args["pipeline"]["stages"] == [list(s) for s in stages]
    pp = int(text[3])
    assert any("--pp-layers" in w for w in report.warnings) == (pp > 1)


def test_zero_2_and_3_leave_the_pipeline(fixtures_dir: Path, tmp_path: Path) -> None:
    source = fixtures_dir / PLAIN / "ckpt"
    reshard(source, tmp_path / "out", Layout.parse("deepspeed:zero=3,dp=2"))
    assert "model.layers.0.self_attn.q_proj.weight" in open_checkpoint(tmp_path / "out").weights
    reshard(tmp_path / "out", tmp_path / "back", Layout.parse("deepspeed:zero=1,pp=2"))
    a, b = open_checkpoint(source), open_checkpoint(tmp_path / "back")
    assert all(same(t, b.optimizer["exp_avg"][n]) for n, t in a.optimizer["exp_avg"].items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_weights_are_in_both_stages(tmp_path: Path, dtype: str) -> None:
    ckpt = family("llama", tied=True, dtype=dtype)
    reshard(ckpt, tmp_path / "a", Layout.parse("deepspeed:zero=1,pp=2,dp=2"))
    found = open_checkpoint(tmp_path / "a")
    assert found.args["pipeline"]["tied"] == {"embed": [0, 1]}
    assert found.tied == {"0.weight": "tied_modules.embed.weight"}
    reshard(found, tmp_path / "b", Layout.parse("deepspeed:zero=1,pp=3"))
    assert open_checkpoint(tmp_path / "b").args["pipeline"]["tied"] == {"embed": [0, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pp=9,zero=1", "nearest valid: pp=6"),
        ("pp=2,zero=1,pp_layers=2+2", "sums up to 4; .* has at least 6"),
        ("pp=2,zero=1,pp_layers=2+2+2", "names 3 stages"),
        ("pp=2,zero=1,pp_layers=6+2", "holds no weights"),
        ("pp=2,zero=3", "nearest valid: zero_stage=1"),
        ("pp=2", "BF16_Optimizer"),
        ("pp=2,tp=2,zero=1", "nothing says how"),
        ("pp=2,cp=2,zero=1", "cannot be cut by cp=2"),
    ],
)
def test_impossible_pipelines_are_refused(
    fixtures_dir: Path, tmp_path: Path, text: str, message: str
) -> None:
    source = fixtures_dir / PLAIN / "ckpt"
    with pytest.raises(MconvError, match=message):
        reshard(source, tmp_path / "out", Layout.parse(f"deepspeed:{text}"))
    assert not any(tmp_path.iterdir())


def test_a_pipelines_widths_must_divide(fixtures_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"tp=3: .* nearest valid: tp=2 or tp=4"):
        reshard(
            fixtures_dir / MEGATRON / "ckpt", tmp_path / "x", Layout.parse("deepspeed:tp=3,zero=1")
        )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autotp_cuts_as_its_plan_does(tmp_path: Path, kind: str, stage: int) -> None:
    """37 rows and 24 columns: the head is cut unevenly, all else in halves."""
    torch = pytest.importorskip("torch")
    ckpt = family(kind, vocab=37, dtype="float32")
    reshard(ckpt, tmp_path / "out", Layout("deepspeed", tp=2, dp=2, zero_stage=stage))
    found = open_checkpoint(tmp_path / "out")
    assert found.layout.tp == 2
    assert_same(replace(ckpt, optimizer={}), replace(found, optimizer={}))
    for state in ("exp_avg", "exp_avg_sq"):
        assert all(same(t, found.optimizer[state][n]) for n, t in ckpt.optimizer[state].items())
    if stage == 3:
        return
    want = {n: t.read() for n, t in ckpt.weights.items()}
    for rank, rows in ((0, slice(0, 19)), (1, slice(19, 37))):
        file = tmp_path / "out" / "global_step7" / f"mp_rank_{rank:02d}_model_states.pt"
        module = torch.load(file, weights_only=False)["module"]
        half = slice(8 * rank, 8 * rank + 8)
        layer = "model.layers.1.self_attn"
        for name, part in (
            ("lm_head.weight", want["lm_head.weight"][rows]),
            ("model.embed_tokens.weight", want["model.embed_tokens.weight"]),
            (f"{layer}.q_proj.weight", want[f"{layer}.q_proj.weight"][half]),
            (f"{layer}.o_proj.weight", want[f"{layer}.o_proj.weight"][:, half]),
        ):
            np.testing.assert_array_equal(module[name].numpy(), part)


def test_autotp_says_how_a_tied_head_is_cut(tmp_path: Path) -> None:
    ckpt = family("llama", tied=True)
    report = reshard(ckpt, tmp_path / "a", Layout("deepspeed", tp=2, zero_stage=1))
    assert any("vocab_parallel_lm_head: true" in w for w in report.warnings)
    args = {"ds_config": {"tensor_parallel": {"vocab_parallel_lm_head": False}}}
    whole = replace(ckpt, args=args)
    report = reshard(whole, tmp_path / "b", Layout("deepspeed", tp=2, zero_stage=1))
    assert any("vocab_parallel_lm_head: false" in w for w in report.warnings)
    for name in "ab":
        found = open_checkpoint(tmp_path / name)
        assert_same(replace(ckpt, scalars={}), replace(found, scalars={}))


def test_autotp_refuses_what_deepspeed_refuses(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"tp=3: 2 key/value heads .*nearest valid: tp=2"):
        reshard(family("llama"), tmp_path / "x", Layout("deepspeed", tp=3, zero_stage=1))
    with pytest.raises(UnsupportedError, match="experts"):
        reshard(family("mixtral"), tmp_path / "x", Layout("deepspeed", tp=2, zero_stage=1))
    with pytest.raises(UnsupportedError, match="--config"):
        bare = replace(family("llama"), config=None)
        reshard(bare, tmp_path / "x", Layout("deepspeed", tp=2, zero_stage=1))
    assert not any(tmp_path.iterdir())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 5))
def test_balanced_stages_differ_least(sizes: list[int], stages: int) -> None:
    """Against all cuts there are."""
    from itertools import combinations, pairwise

    bounds = balanced(sizes, stages)
    assert len(bounds) == stages + 1
    if len(sizes) <= stages:
        assert bounds == uniform(len(sizes), stages)
        return

    def spread(cut: tuple[int, ...]) -> int:
        sums = [sum(sizes[a:b]) for a, b in pairwise(cut)]
        return max(sums) - min(sums)

    every = combinations(range(1, len(sizes)), stages - 1)
    assert spread(bounds) <= min(spread((0, *cut, len(sizes))) for cut in every)


@pytest.mark.parametrize(
    ("sizes", "stages", "bounds"),
    [  # what DeepSpeed 0.19.8 answers
        ([5, 5, 5, 5], 2, (0, 2, 4)),
        ([0, 0, 7, 7, 0], 2, (0, 3, 5)),
        ([9, 1, 1, 1, 9], 3, (0, 1, 4, 5)),
        ([1, 2], 4, (0, 1, 2, 2, 2)),
    ],
)
def test_balanced_is_deepspeeds(sizes: list[int], stages: int, bounds: tuple[int, ...]) -> None:
    assert balanced(sizes, stages) == bounds


def test_the_sources_method_is_found() -> None:
    """Uniform stages of unequal layers are cut uniformly again."""
    sizes = {"0.weight": 90} | {f"{n}.w": 1 for n in range(1, 6)}
    layers = read_layers(sizes, {}, {})
    bounds, how = choose_bounds(layers, 3, None, [[0, 1, 2], [3, 4, 5]])
    assert (bounds, "'uniform'" in how) == ((0, 2, 4, 6), True)
    bounds, how = choose_bounds(layers, 3, None, [])
    assert "'parameters'" in how
