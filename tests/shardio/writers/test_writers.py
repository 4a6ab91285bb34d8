"""Every training layout gives back what was written, bit for bit, over random models and meshes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.errors import LayoutError
from mconv.shardio import Checkpoint, Layout, open_checkpoint
from mconv.shardio.dtypes import FLOAT32
from mconv.shardio.training_state import optimizer_step, training_state
from mconv.shardio.writers import get_writer

from .models import assert_same, make, through, write

LAYOUTS = st.one_of(
    st.just(Layout("torch")),
    st.just(Layout("hf")),
    st.just(Layout("deepspeed-universal")),
    st.builds(
        lambda f, dp, tp: Layout(f, dp=dp, tp=tp),
        st.sampled_from(["dcp", "hf-dcp"]),
        st.integers(1, 7),
        st.integers(1, 3),
    ),
    st.builds(
        lambda stage, dp: Layout("deepspeed", dp=dp, zero_stage=stage),
        st.sampled_from([0, 1, 2, 3]),
        st.integers(1, 7),
    ),
)
MODELS = st.builds(
    make,
    st.integers(0, 10**6),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    groups=st.sampled_from([1, 2]),
    frozen=st.booleans(),
    tied=st.booleans(),
)


def check(got: Checkpoint, want: Checkpoint) -> None:
    """Weights, masters, moments, step, groups and ties."""
    owned = {a: o for a, o in want.tied.items() if a not in got.weights}
    assert {*got.weights} - {*want.tied} == {*want.weights}
    assert {a: got.tied.get(a) for a in owned} == owned
    masters = want.optimizer.get("master", {})
    for name, tensor in want.weights.items():
        whole = got.optimizer.get("master", {}).get(name, got.weights[name])
        assert_same(whole.cast(FLOAT32), masters.get(name, tensor).cast(FLOAT32), name)
        assert_same(got.weights[name].cast(tensor.dtype), tensor, name)
    for state in {*want.optimizer} - {"master"}:
        assert {*got.optimizer[state]} == {*want.optimizer[state]}
        for name, tensor in want.optimizer[state].items():
            assert_same(got.optimizer[state][name], tensor, f"{state} {name}")
    assert optimizer_step(got) == optimizer_step(want)
    ours, theirs = training_state(got).groups, training_state(want).groups
    assert [{*g.names} for g in ours] == [{*g.names} for g in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert {k: a.settings.get(k) for k in b.settings} == dict(b.settings)


@given(MODELS, LAYOUTS)
@settings(max_examples=60, deadline=None)
def test_written_is_read_back(ckpt: Checkpoint, layout: Layout) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(through(ckpt, layout, Path(folder) / "out"), ckpt)


@given(MODELS, st.lists(LAYOUTS, min_size=2, max_size=4))
@settings(max_examples=20, deadline=None)
def test_chains_are_read_back(ckpt: Checkpoint, layouts: list[Layout]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = ckpt
        for k, layout in enumerate(layouts):
            found = through(found, layout, Path(folder) / str(k))
        check(found, ckpt)


@pytest.mark.parametrize("text", ["torch", "dcp:dp=3,tp=2", "hf-dcp:dp=2", "deepspeed:zero=1,dp=2",
                                  "deepspeed:dp=2",
                                  "deepspeed:zero=3,dp=2", "deepspeed-universal"])  # fmt: skip
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_alone(tmp_path: Path, text: str, dtype: str) -> None:
    ckpt = make(5, dtype=dtype, optimizer=False)
    got = through(ckpt, Layout.parse(text), tmp_path / "out")
    assert got.weights.keys() == ckpt.weights.keys()
    for name, tensor in ckpt.weights.items():
        assert_same(got.weights[name].cast(tensor.dtype), tensor, name)
    assert not {*got.optimizer} - {"master"}


@pytest.mark.parametrize("text", ["torch", "dcp:dp=5,tp=2", "hf-dcp:dp=3,tp=2",
                                  "deepspeed:zero=2,dp=3", "deepspeed:zero=3,dp=3",
                                  "deepspeed-universal"])  # fmt: skip
def test_bytes_do_not_depend_on_threads(tmp_path: Path, text: str) -> None:
    ckpt = make(11, frozen=True)
    folders = [write(ckpt, Layout.parse(text), tmp_path / str(n), n) for n in (1, 4)]
    names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize("text", ["deepspeed:zero=3,dp=64", "deepspeed:zero=1,dp=64",
                                  "dcp:dp=64", "dcp:dp=2,tp=40", "hf-dcp:dp=64"])  # fmt: skip
def test_more_ranks_than_rows(tmp_path: Path, text: str) -> None:
    ckpt = make(3, layers=1)
    check(through(ckpt, Layout.parse(text), tmp_path / "out"), ckpt)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch:dp=2", "dp=2"),
        ("dcp:pp=2", "pp=2"),
        ("hf-dcp:ep=2", "ep=2"),
        ("deepspeed:zero=1,ep=2", "ep=2"),
        ("deepspeed-universal:dp=2", "dp=2"),
    ],
)
def test_impossible_layouts_are_refused(text: str, message: str) -> None:
    layout = Layout.parse(text)
    with pytest.raises(LayoutError, match=message):
        get_writer(layout.format).plan(make(1), layout)


def test_parameters_without_states_start_from_zero(tmp_path: Path) -> None:
    """An expert that was never chosen has no moments in torch's Adam."""
    ckpt = make(8, dtype="float32", groups=1)
    name = "model.layers.1.mlp.up_proj.weight"
    states = {s: {n: t for n, t in part.items() if n != name or s == "exp_avg_sq"}
              for s, part in ckpt.optimizer.items()}  # fmt: skip
    from dataclasses import replace

    for text in ("deepspeed:zero=2,dp=3", "deepspeed:zero=3,dp=3"):
        got = through(replace(ckpt, optimizer=states), Layout.parse(text), tmp_path / text)
        assert not got.optimizer["exp_avg"][name].read().any()
        assert_same(got.optimizer["exp_avg_sq"][name], states["exp_avg_sq"][name], name)


def test_the_source_is_found_from_the_save_folder(tmp_path: Path) -> None:
    ckpt = make(2)
    for text in ("deepspeed:zero=1,dp=2", "deepspeed-universal"):
        folder = write(ckpt, Layout.parse(text), tmp_path / text)
        tag = f"global_step{ckpt.step}"
        assert open_checkpoint(folder).path == folder / tag
        assert open_checkpoint(folder / tag).step == ckpt.step
