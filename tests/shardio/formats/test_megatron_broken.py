"""Megatron-LM's legacy format: every way of breaking a checkpoint is refused by name, and the
padded vocabulary is never trimmed or kept silently.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mconv.convert.naming import to_hf
from mconv.errors import ConfigError, FormatError, LayoutError, MconvError, UnsupportedError
from mconv.shardio.compare import check_replicas
from mconv.shardio.registry import open_checkpoint

from .megatron_cases import EMBEDDING, Bomb, copy_of
from .megatron_writer import Plan, make_model, write_legacy

FILE = "model_optim_rng.pt"


@pytest.fixture
def base(fixtures_dir: Path) -> Path:
    return fixtures_dir / "megatron"


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a fixture; returns its iteration folder."""
    return lambda case: copy_of(base / case, "torch", tmp_path) / "iter_0000010"


@pytest.mark.parametrize(
    ("case", "victim", "says"),
    [
        ("llama_tp2pp2", "mp_rank_01_001", "mp_rank_01_001"),
        ("llama_tp4_gqa2", "mp_rank_02", "mp_rank_02"),
        ("mixtral_ep2", "mp_rank_00_001", "mp_rank_00_001"),
        ("mixtral_grouped_tp2ep2", "mp_rank_01_001", "mp_rank_01_001"),
        ("deepseek_tp2ep2", "mp_rank_01_001", "mp_rank_01_"),
        ("qwen3moe_tp2ep2pp2", "mp_rank_00_001_000", "mp_rank_00_001_"),
    ],
)
def test_missing_rank_is_named(copied: Callable, case: str, victim: str, says: str) -> None:
    root = copied(case)
    shutil.rmtree(root / victim)
    with pytest.raises(FormatError, match=re.escape(says)):
        open_checkpoint(root)


@pytest.mark.parametrize(
    ("case", "a", "b"),
    [
        ("llama_tp2pp2", "mp_rank_00_000", "mp_rank_01_000"),
        ("llama_tp2pp2", "mp_rank_00_000", "mp_rank_00_001"),
        ("llama_tp4_gqa2", "mp_rank_01", "mp_rank_02"),
        ("mixtral_ep2", "mp_rank_00_000", "mp_rank_00_001"),
        ("qwen3moe_tp2ep2pp2", "mp_rank_01_000_001", "mp_rank_00_001_000"),
    ],
)
def test_swapped_ranks_are_refused(copied: Callable, case: str, a: str, b: str) -> None:
    root = copied(case)
    (root / a).rename(root / "aside")
    (root / b).rename(root / a)
    (root / "aside").rename(root / b)
    with pytest.raises(FormatError, match="swapped"):
        open_checkpoint(root)


def test_swapped_stages_of_a_conversion_tool_are_refused(tmp_path: Path) -> None:
    """All files written by one process: only the tensors tell."""
    plan = Plan(pp=2, counts=(1, 1), args={"rank": 0})
    root = write_legacy(tmp_path, make_model(plan), plan)
    (root / "mp_rank_00_000").rename(root / "aside")
    (root / "mp_rank_00_001").rename(root / "mp_rank_00_000")
    (root / "aside").rename(root / "mp_rank_00_001")
    with pytest.raises(FormatError, match="swapped"):
        open_checkpoint(root)


def test_embedding_on_two_stages_is_compared(tmp_path: Path) -> None:
    """Stages that predict several tokens hold the embedding again."""
    plan = Plan(pp=2, counts=(1, 1))
    model = make_model(plan)
    again = {EMBEDDING: model[EMBEDDING]}
    ckpt = open_checkpoint(write_legacy(tmp_path, model, plan, lambda m: {**m, **again}))
    assert set(ckpt.weights) == set(model)
    assert len(ckpt.replicas[EMBEDDING]) == 1


def test_leftover_ranks_are_refused(copied: Callable) -> None:
    root = copied("llama_tp2pp2")
    shutil.copytree(root / "mp_rank_00_000", root / "mp_rank_02_000")
    with pytest.raises(FormatError, match="leftover"):
        open_checkpoint(root)


def test_mixed_saves_are_refused(tmp_path: Path) -> None:
    steps = iter((5, 6))
    plan = Plan(tp=2)
    root = write_legacy(
        tmp_path, make_model(plan), plan, extra=lambda _: {"iteration": next(steps)}
    )
    with pytest.raises(FormatError, match="iteration is 6"):
        open_checkpoint(root)


def test_known_incomplete_save_is_diagnosed(tmp_path: Path) -> None:
    plan = Plan(tp=4, ep=2, etp=1, experts=4, old_rule=True)
    root = write_legacy(tmp_path, make_model(plan), plan)
    with pytest.raises(FormatError, match="#4234"):
        open_checkpoint(root)


def test_differing_copies_are_found(copied: Callable) -> None:
    root = copied("llama_tied_tp2pp2")
    ckpt = open_checkpoint(root)
    for name in ("decoder.layers.0.input_layernorm.weight", EMBEDDING):
        chunk = ckpt.replicas[name][0].chunks[0]  # type: ignore[attr-defined]
        with chunk.source.path.open("r+b") as file:
            file.seek(chunk.offset)
            byte = file.read(1)
            file.seek(chunk.offset)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(FormatError, match=re.escape(name)):
            check_replicas({name: ckpt.weights[name]}, {name: ckpt.replicas[name]})


@pytest.mark.parametrize("keep", [0, 100, -1, -5000])
def test_truncated_file_is_refused(copied: Callable, keep: int) -> None:
    root = copied("llama_tp2pp2")
    path = root / "mp_rank_01_000" / FILE
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    with pytest.raises(FormatError, match="mp_rank_01_000"):
        open_checkpoint(root)


def test_hostile_pickle_does_not_run(copied: Callable, tmp_path: Path) -> None:
    root = copied("llama_tp1pp1")
    proof = tmp_path / "ran"
    torch.save({"args": Bomb(f"touch {proof}"), "model": {}}, root / "mp_rank_00" / FILE)
    with pytest.raises(MconvError):
        open_checkpoint(root)
    assert not proof.exists()


def test_objects_in_place_of_tensors_are_refused(tmp_path: Path) -> None:
    plan = Plan()
    spoil = {"decoder.layers.0.mlp.linear_fc1.weight": Bomb("true")}
    root = write_legacy(tmp_path, make_model(plan), plan, lambda m: {**m, **spoil})
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.linear_fc1\.weight"):
        open_checkpoint(root)


def test_unknown_tensors_on_several_ranks_are_refused(tmp_path: Path) -> None:
    plan = Plan(tp=2)
    root = write_legacy(
        tmp_path, make_model(plan), plan, lambda m: {**m, "decoder.novel.weight": torch.ones(2)}
    )
    with pytest.raises(UnsupportedError, match=r"decoder\.novel"):
        open_checkpoint(root)


def test_lost_layers_are_noticed(tmp_path: Path) -> None:
    plan = Plan(pp=2, counts=(2, 2), args={"num_layers": 6})
    root = write_legacy(tmp_path, make_model(plan), plan)
    with pytest.raises(LayoutError, match="num_layers is 6"):
        open_checkpoint(root)


def test_unfinished_newer_save_is_mentioned(copied: Callable) -> None:
    root = copied("llama_tp1pp1")
    newer = root.rename(root.parent / "iter_0000020")
    assert any("incomplete" in w for w in open_checkpoint(newer).warnings)


_ARGS = st.sampled_from(
    [
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers", "num_experts",
        "expert_model_parallel_size", "expert_tensor_parallel_size", "num_attention_heads",
        "virtual_pipeline_model_parallel_size", "kv_channels", "hidden_size", "world_size",
        "make_vocab_size_divisible_by", "group_query_attention", "num_query_groups", "rank",
        "moe_ffn_hidden_size", "moe_router_topk", "rotary_percent", "context_parallel_size",
    ]
)  # fmt: skip
_JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=3), st.floats(),
    st.integers(-1, 5), st.lists(st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    args=st.dictionaries(_ARGS, _JUNK, min_size=1, max_size=3),
    root=st.dictionaries(
        st.sampled_from(
            ["iteration", "checkpoint_version", "optimizer", "model", "model1", "args"]
        ),
        st.one_of(_JUNK, st.just({}), st.just({"state": {}, "param_groups": [{}, {}]})),
        max_size=1,
    ),
    plan=st.sampled_from([Plan(tp=2), Plan(ep=2, experts=2), Plan(pp=2, counts=(1, 1))]),
)
def test_nonsense_settings_never_crash(
    tmp_path_factory: pytest.TempPathFactory,
    args: dict[str, object],
    root: dict[str, object],
    plan: Plan,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    odd = replace(plan, args=args)
    where = write_legacy(folder, make_model(odd), odd, extra=lambda _: root)
    with contextlib.suppress(MconvError):
        ckpt = open_checkpoint(where)
        to_hf(ckpt, vocab_size=16)
    shutil.rmtree(folder)


# -- vocabulary ------------------------------------------------------------------------------------


def test_padded_vocabulary_needs_a_size(copied: Callable) -> None:
    ckpt = open_checkpoint(copied("llama_tp2pp2"))
    assert ckpt.config is None
    with pytest.raises(ConfigError, match=r"512 rows.*--vocab-size"):
        to_hf(ckpt)
    assert to_hf(ckpt, vocab_size=512).weights["lm_head.weight"].shape == (512, 64)
    assert to_hf(ckpt, vocab_size=317).config["vocab_size"] == 317  # type: ignore[index]
    assert any("padded to 256" in w for w in to_hf(ckpt, vocab_size=200).warnings)
    with pytest.raises(ConfigError, match="fewer than the vocabulary"):
        to_hf(ckpt, vocab_size=513)


def test_config_of_another_model_is_refused(base: Path) -> None:
    ckpt = open_checkpoint(base / "llama_tp2pp2" / "torch", config=base / "qwen2_bias_tp2")
    with pytest.raises(ConfigError):
        to_hf(ckpt)
    other = replace(ckpt, config={**(ckpt.config or {}), "num_hidden_layers": 9})
    with pytest.raises(ConfigError, match="another model"):
        to_hf(other)
