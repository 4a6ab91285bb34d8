"""Any chain of targets gives weights and moments back bit for bit, whatever names lie between."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv import Layout, open_checkpoint, reshard, roundtrip
from mconv.errors import LayoutError
from mconv.shardio.writers import writers

from ..shardio.writers.families import family

KINDS = ("llama", "qwen2", "qwen3", "mixtral")
ONE, SMALL = st.just(1), st.integers(1, 4)
HALF = st.sampled_from([1, 2])
FAMILIES = {"meta": ("llama", "mixtral"), "nanotron": ("llama", "qwen2"),
            "torchtitan": ("llama", "qwen3")}  # fmt: skip


def megatron(name: str, kind: str) -> st.SearchStrategy[Layout]:
    ep = HALF if kind == "mixtral" else ONE
    etp = HALF if kind == "mixtral" and name == "megatron-dist" else st.none()
    return st.builds(
        lambda tp, pp, vpp, ep, etp, zero, impl, tail: Layout(
            name, tp=tp, pp=pp, vpp=vpp if pp > 1 else 1, ep=ep, etp=etp, zero_stage=zero,
            transformer_impl=impl, make_vocab_divisible_by=tail,
        ),
        st.sampled_from([1, 2, 4]), HALF, HALF, ep, etp, st.sampled_from([0, 1]),
        st.sampled_from(["local", "transformer_engine"]), st.sampled_from([1, 8]),
    )  # fmt: skip


def deepspeed(kind: str) -> st.SearchStrategy[Layout]:
    """ZeRO, with AutoTP's ranks or as a pipeline."""
    zero = st.builds(
        lambda dp, zero, tp: Layout("deepspeed", dp=dp, zero_stage=zero, tp=tp),
        SMALL, st.integers(0, 3), ONE if kind == "mixtral" else HALF,
    )  # fmt: skip
    pipe = st.builds(
        lambda dp, pp: Layout("deepspeed-pipeline", dp=dp, zero_stage=1, pp=pp), SMALL, SMALL
    )
    return st.one_of(zero, pipe)


def layouts(kind: str) -> st.SearchStrategy[Layout]:
    """Layouts of every target that can hold such a model with its optimizer."""
    found = [
        st.sampled_from([Layout("hf"), Layout("torch"), Layout("deepspeed-universal")]),
        st.builds(lambda f, dp, tp: Layout(f, dp=dp, tp=tp), st.sampled_from(["dcp", "hf-dcp"]),
                  SMALL, SMALL),
        deepspeed(kind),
        megatron("megatron", kind),
        megatron("megatron-dist", kind),
    ]  # fmt: skip
    if kind in FAMILIES["torchtitan"]:
        found.append(st.builds(lambda dp, tp: Layout("torchtitan", dp=dp, tp=tp), SMALL, SMALL))
    if kind in FAMILIES["nanotron"]:
        found.append(
            st.builds(
                lambda tp, pp, dp, zero: Layout("nanotron", tp=tp, pp=pp, dp=dp, zero_stage=zero),
                HALF, HALF, SMALL, st.sampled_from([0, 1]),
            )
        )  # fmt: skip
    return st.one_of(found)


@st.composite
def cases(draw: Any) -> tuple[Any, list[Layout]]:
    kind = draw(st.sampled_from(KINDS))
    ckpt = family(
        kind,
        draw(st.integers(0, 999)),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        layers=draw(st.sampled_from([4, 8])),
        vocab=draw(st.integers(33, 48)),
        kv_heads=draw(st.sampled_from([2, 4])),
        tied=draw(st.booleans()) if kind != "mixtral" else False,
        theta=draw(st.sampled_from([10000.0, 500000.0])),
    )
    chain = draw(st.lists(layouts(kind), min_size=1, max_size=3))
    for k, (old, new) in enumerate(pairwise(chain), start=1):
        if old.format == "deepspeed-pipeline" and new.format == "deepspeed" and not new.zero_stage:
            chain[k] = replace(new, zero_stage=1)  # it stays a pipeline, which bf16 forbids here
    return ckpt, chain


@given(cases())
@settings(max_examples=25, deadline=None)
def test_chains_give_everything_back(case: tuple[Any, list[Layout]]) -> None:
    ckpt, chain = case
    with tempfile.TemporaryDirectory() as work:
        report = roundtrip(ckpt, chain, work=work)
    assert report.lossless, (report.path, report.missing, report.extra, report.changed)
    assert report.tensors >= 3 * len(ckpt.weights)
    assert not any("step was" in note for note in report.notes)


@pytest.mark.parametrize("kind", FAMILIES["meta"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_metas_files_give_the_weights_back(kind: str, tied: bool, theta: float) -> None:
    ckpt = family(kind, 3, optimizer=False, tied=tied and kind == "llama", theta=theta)
    for text in ("meta", "meta:tp=4") if kind == "llama" else ("meta",):
        with tempfile.TemporaryDirectory() as work:
            report = roundtrip(ckpt, [text, "hf"], work=work, weights_only=True)
        assert report.lossless, (text, report.missing, report.extra, report.changed)


def test_every_writer_is_among_the_targets() -> None:
    """A new target belongs into the chains above."""
    known = {"hf", "torch", "deepspeed-universal", "dcp", "hf-dcp", "deepspeed", "megatron",
             "deepspeed-pipeline", "megatron-dist", "torchtitan", "nanotron",
             "meta"}  # fmt: skip
    assert set(writers()) == known


@pytest.mark.parametrize(
    ("kind", "text", "nearest"),
    [
        ("llama", "megatron:tp=3", "tp=2 or tp=4"),
        ("llama", "megatron-dist:tp=3", "tp=2 or tp=4"),
        ("llama", "megatron:pp=3", "pp="),
        ("llama", "megatron-dist:pp=3", "pp="),
        ("mixtral", "megatron:ep=3", "ep=2 or ep=4"),
        ("mixtral", "megatron-dist:ep=3", "ep=2 or ep=4"),
        ("mixtral", "megatron:tp=2,ep=8", "ep=4"),
        ("mixtral", "megatron-dist:tp=2,etp=5", "etp=4 or etp=6"),
        ("llama", "megatron:pp=2,vpp=3", "vpp=1 or vpp=2"),
        ("llama", "megatron-dist:pp=2,vpp=3", "vpp=1 or vpp=2"),
        ("llama", "deepspeed:tp=3", "tp=2"),
        ("llama", "deepspeed:pp=8,zero=1", "pp=7"),
        ("llama", "deepspeed:pp=2,zero=2", "zero_stage=1"),
        ("llama", "meta:tp=3", "tp=2 or tp=4"),
        ("llama", "nanotron:tp=3", "tp=2"),
        ("llama", "nanotron:pp=9", "pp="),
    ],
)
def test_impossible_sizes_name_the_nearest(
    tmp_path: Any, kind: str, text: str, nearest: str
) -> None:
    ckpt = family(kind, layers=4)
    if text.startswith("meta"):
        ckpt = replace(ckpt, optimizer={})
    with pytest.raises(LayoutError, match=f"nearest valid: {nearest}"):
        roundtrip(ckpt, [text], work=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["hf:tp=2", "torch:dp=2", "dcp:pp=2", "hf-dcp:ep=2", "deepspeed:ep=2", "deepspeed:pp=2,cp=2",
     "deepspeed-universal:dp=2", "torchtitan:pp=2", "nanotron:ep=2", "meta:dp=2", "gguf:tp=2"],
)  # fmt: skip
def test_axes_that_a_target_lacks_are_refused(tmp_path: Any, text: str) -> None:
    ckpt = family("llama", optimizer=False)
    with pytest.raises(LayoutError, match="cannot be cut by"):
        reshard(ckpt, tmp_path / "out", Layout.parse(text))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("mixtral", "megatron:tp=2,etp=3", "use --etp 2, or --to megatron-dist"),
        ("llama", "megatron:etp=2", "no experts"),
        ("llama", "megatron:vpp=2", "give --pp 2 or more, or --vpp 1"),
        ("llama", "megatron:pp=2,pp_layers=3+2", "the model has 4; such as --pp-layers 2,2"),
        ("llama", "megatron-dist:pp=3,pp_layers=2+2", "for pp=3; such as --pp-layers 2,1,1"),
        ("llama", "megatron:pp=2,vpp=2,pp_layers=1+3", "must divide"),
        ("llama", "nanotron:pp=2,pp_layers=3+2", "sum to 4"),
        ("llama", "dcp:pp_layers=2+2", "no stages"),
        ("llama", "hf:pp_layers=4", "no stages"),
        ("llama", "nanotron:cp=2", "cannot be cut by cp=2"),
        ("llama", "megatron:zero=2", "use --zero-stage 1"),
    ],
)
def test_what_does_not_fit_says_what_would(
    tmp_path: Any, kind: str, text: str, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        reshard(family(kind, layers=4), tmp_path / "out", Layout.parse(text))
    assert not any(tmp_path.iterdir())


def test_a_vocabulary_is_padded_to_at_least_one_row() -> None:
    with pytest.raises(LayoutError, match="make_vocab_divisible_by=0"):
        Layout("megatron", make_vocab_divisible_by=0)


@pytest.mark.parametrize("kind", FAMILIES["torchtitan"])
def test_a_tie_survives_a_target_that_writes_both(tmp_path: Any, kind: str) -> None:
    chain = ["torchtitan:dp=2", "megatron:tp=2"]
    assert roundtrip(family(kind, tied=True), chain, work=tmp_path).lossless


@pytest.mark.parametrize("text", ["megatron:tp=2", "megatron:zero_stage=1", "megatron-dist"])
def test_megatron_starts_frozen_weights_from_zero(tmp_path: Any, text: str) -> None:
    ckpt = family("llama", dtype="float32")
    frozen = "model.layers.0.mlp.down_proj.weight"
    states = {s: {n: t for n, t in part.items() if n != frozen}
              for s, part in ckpt.optimizer.items()}  # fmt: skip
    report = reshard(replace(ckpt, optimizer=states), tmp_path / "out", Layout.parse(text))
    assert any("no optimizer states" in w for w in report.warnings)
    found = open_checkpoint(tmp_path / "out")
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert found.weights[name].read().tobytes() == ckpt.weights[frozen].read().tobytes()
    if name in found.optimizer["exp_avg"]:
        assert not found.optimizer["exp_avg"][name].read().any()
