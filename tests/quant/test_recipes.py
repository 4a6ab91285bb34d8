"""Recipes against llama.cpp's own type-selection snapshots, and each option on its own."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import pytest
from mconv.quant import TYPES, QuantError, type_by_name
from mconv.quant.recipes import (
    ALIASES,
    TARGETS,
    Choice,
    ModelFacts,
    RecipeOptions,
    TensorRecord,
    choose,
    parse_override,
    parse_target,
    unmet_importance,
)

from .snapshot_models import MODELS, records

F32 = type_by_name("F32")
DENSE = ModelFacts("llama", 8, 8, 8)


def types(
    tensors: list[TensorRecord], target: str, model: ModelFacts = DENSE, **options: object
) -> dict[str, str]:
    found = choose(tensors, parse_target(target), model, RecipeOptions(**options))
    return {c.name: c.type.name for c in found}


def layer_tensors(layers: int = 8, cols: int = 256, ffn: int = 512) -> list[TensorRecord]:
    shapes = {
        "attn_q": (cols, cols), "attn_k": (cols, cols), "attn_v": (cols, cols),
        "attn_output": (cols, cols), "ffn_gate": (ffn, cols), "ffn_up": (ffn, cols),
        "ffn_down": (cols, ffn), "attn_norm": (cols,),
    }  # fmt: skip
    out = [TensorRecord("token_embd.weight", (300, cols), F32)]
    for layer in range(layers):
        out += [TensorRecord(f"blk.{layer}.{n}.weight", s, F32) for n, s in shapes.items()]
    return out


def with_output(tensors: list[TensorRecord], cols: int = 256) -> list[TensorRecord]:
    return [*tensors, TensorRecord("output.weight", (300, cols), F32)]


@cache
def sections(path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Target name to (base type, tensor name to type)."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"\[(\w+)\] (\w+)", line):
            found[match[1]] = (match[2].upper(), {})
            current = match[1]
        elif line and not line.startswith("#"):
            name, kind = line.rsplit(" ", 1)
            found[current][1][name] = kind.upper()
    return found


@pytest.mark.parametrize("model", MODELS)
def test_snapshot(model: str, data_dir: Path) -> None:
    facts = MODELS[model][0]
    tensors = records(model)
    random.Random(1).shuffle(tensors)
    checked = 0
    for target, (base, differ) in sections(data_dir / "snapshots" / f"{model}.schema").items():
        parsed = parse_target(target)
        assert parsed.base.name == base
        chosen = {c.name: c.type.name for c in choose(tensors, parsed, facts)}
        got = {n: t for n, t in chosen.items() if t != base and not (t == "F32" and kept(n))}
        assert got == differ, target
        checked += 1
    assert checked == 33


def kept(name: str) -> bool:
    return "norm" in name or "ffn_gate_inp" in name or "conv1d" in name


def test_choices_are_in_file_order() -> None:
    names = ["blk.10.a.weight", "blk.2.b.weight", "output.weight", "blk.2.B.weight", "a.weight"]
    tensors = [TensorRecord(n, (32, 32), F32) for n in names]
    got = [c.name for c in choose(tensors, parse_target("Q8_0"), DENSE)]
    assert got == [
        "a.weight", "output.weight", "blk.2.B.weight", "blk.2.b.weight", "blk.10.a.weight"
    ]  # fmt: skip


def test_every_target_resolves() -> None:
    assert len({t.file_type for t in TARGETS.values()}) == len(TARGETS)
    for name, target in TARGETS.items():
        assert parse_target(name.lower()) is target
        if not target.copies:
            assert target.base.name in TYPES
            assert parse_target(str(target.file_type)) is target
    for alias, name in ALIASES.items():
        assert parse_target(alias).name == name


def test_unknown_target_suggests() -> None:
    with pytest.raises(QuantError, match=r"'Q4_K_X'.*did you mean 'Q4_K"):
        parse_target("Q4_K_X")
    with pytest.raises(QuantError, match="known: F32"):
        parse_target("zzzzzz")


@pytest.mark.parametrize("target", TARGETS)
def test_vectors_norms_and_routers_stay(target: str) -> None:
    tensors = [
        TensorRecord("blk.0.attn_norm.weight", (512,), F32),
        TensorRecord("blk.0.ffn_gate_inp.weight", (8, 512), F32),
        TensorRecord("blk.0.attn_q.bias", (2, 512), F32),
        TensorRecord("blk.0.attn_q.weight", (1, 512), F32),
        TensorRecord("position_embd.weight", (8, 512), F32),
        TensorRecord("blk.0.ssm_conv1d.weight", (512, 4), F32),
        TensorRecord("blk.0.table.weight", (512, 256), type_by_name("I32")),
    ]
    assert set(types(tensors, target).values()) <= {"F32", "I32"}


def test_copy_keeps_every_type() -> None:
    tensors = [
        TensorRecord("blk.0.attn_q.weight", (256, 256), type_by_name("Q3_K")),
        TensorRecord("token_embd.weight", (256, 256), type_by_name("BF16")),
    ]
    assert types(tensors, "COPY") == {
        "token_embd.weight": "BF16",
        "blk.0.attn_q.weight": "Q3_K",
    }


def test_tied_embedding_is_typed_as_output() -> None:
    tied = layer_tensors()
    assert types(tied, "Q4_K_M")["token_embd.weight"] == "Q6_K"
    assert types(with_output(tied), "Q4_K_M")["token_embd.weight"] == "Q4_K"
    assert types(tied, "IQ2_XS")["token_embd.weight"] == "Q5_K"
    assert types(tied, "Q4_K_M", output_type="F16")["token_embd.weight"] == "F16"


def test_output_and_embedding_options() -> None:
    tensors = with_output(layer_tensors())
    got = types(tensors, "Q4_K_M", output_type="q8_0", embedding_type="bf16")
    assert (got["output.weight"], got["token_embd.weight"]) == ("Q8_0", "BF16")
    assert types(tensors, "Q4_K_M", leave_output=True)["output.weight"] == "F32"
    assert types(tensors, "F16", output_type="Q8_0")["output.weight"] == "Q8_0"
    with pytest.raises(QuantError, match=r"'output\.weight'.*300.*--output-tensor-type"):
        types([TensorRecord("output.weight", (8, 300), F32)], "F16", output_type="Q8_0")


def test_pure_gives_the_base_everywhere() -> None:
    got = types(with_output(layer_tensors()), "Q4_K_M", pure=True)
    assert {t for n, t in got.items() if "norm" not in n} == {"Q4_K"}


def test_first_matching_pattern_wins_and_does_not_count() -> None:
    tensors = layer_tensors()
    plain = types(tensors, "Q4_K_S")
    assert [plain[f"blk.{i}.attn_v.weight"] for i in range(6)] == ["Q5_K"] * 4 + ["Q4_K"] * 2
    patterns = ((r"blk\.[01]\.ATTN_V", "Q8_0"), (r"attn_\D", "Q6_K"))
    got = types(tensors, "Q4_K_S", tensor_types=patterns[:1])
    assert [got[f"blk.{i}.attn_v.weight"] for i in range(7)] == (
        ["Q8_0"] * 2 + ["Q5_K"] * 4 + ["Q4_K"]
    )
    both = types(tensors, "Q4_K_S", tensor_types=patterns)
    assert (both["blk.1.attn_v.weight"], both["blk.2.attn_v.weight"]) == ("Q8_0", "Q6_K")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("attn_v", "REGEX=TYPE"), ("=q8_0", "REGEX=TYPE"), ("a=", "REGEX=TYPE"),
     ("(=q8_0", "regular expression"), ("a=q9_9", "unknown tensor type"), ("a=i32", "I32")],
)  # fmt: skip
def test_bad_override(text: str, problem: str) -> None:
    with pytest.raises(QuantError, match=problem):
        parse_override(text)


def test_override_splits_at_the_last_equals() -> None:
    assert parse_override("(?=attn)=q4_k") == ("(?=attn)", "Q4_K")


@pytest.mark.parametrize(
    ("target", "cols", "expected"),
    [("Q4_K_S", 288, "Q5_0"), ("Q6_K", 96, "Q8_0"), ("Q5_K_S", 32, "Q5_1"), ("Q3_K_S", 64, "Q4_0"),
     ("IQ4_XS", 160, "IQ4_NL"), ("TQ2_0", 32, "Q4_0"), ("Q4_K_S", 100, "F16"), ("Q8_0", 33, "F16"),
     ("Q1_0", 32, "Q4_0")],
)  # fmt: skip
def test_row_fallback(target: str, cols: int, expected: str) -> None:
    tensors = [TensorRecord("blk.7.attn_q.weight", (4, cols), F32)]
    (found,) = choose(tensors, parse_target(target), DENSE)
    assert found.type.name == expected
    assert f"rows of {cols}" in found.note


def test_importance_changes_some_mixes() -> None:
    tensors = layer_tensors(16)
    model = ModelFacts("llama", 16, 8, 8)
    for target, blind, guided in [("Q4_0", "Q4_0", "Q4_1"), ("IQ4_XS", "Q5_K", "IQ4_XS")]:
        name = "blk.0.ffn_down.weight"
        assert types(tensors, target, model)[name] == blind
        assert types(tensors, target, model, has_importance=True)[name] == guided


def test_eight_experts_and_falcon() -> None:
    tensors = with_output(layer_tensors(16))
    mixtral = types(tensors, "Q3_K_S", ModelFacts("llama", 16, 32, 8, 8))
    assert {mixtral[f"blk.3.attn_{n}.weight"] for n in "vk"} == {"Q8_0"}
    assert mixtral["blk.3.attn_output.weight"] == "Q5_K"
    falcon = types(tensors, "Q4_K_M", ModelFacts("falcon", 16, 32, 32))
    assert falcon["output.weight"] == "Q8_0"
    down = [falcon[f"blk.{i}.ffn_down.weight"] for i in range(5)]
    assert down == ["Q6_K", "Q5_K", "Q4_K", "Q4_K", "Q5_K"]


def test_pruned_model_counts_over_all_layers() -> None:
    """Facts are the whole model's, records only what is left."""
    left = [t for t in layer_tensors(16) if t.layer is None or t.layer < 8]
    got = types(left, "Q4_K_S", ModelFacts("llama", 16, 8, 8))
    assert [got[f"blk.{i}.ffn_down.weight"] for i in range(3)] == ["Q5_K", "Q5_K", "Q4_K"]


@pytest.mark.parametrize(
    ("target", "names"),
    [("IQ2_XXS", 47), ("IQ3_XXS", 32), ("Q2_K_S", 55), ("Q2_K", 0), ("Q4_K_M", 0)],
)
def test_unmet_importance_names_the_tensors(target: str, names: int) -> None:
    parsed = parse_target(target)
    choices = choose(with_output(layer_tensors()), parsed, DENSE)
    missing = unmet_importance(choices, parsed, lambda name: False)
    assert len(missing) == names
    assert not unmet_importance(choices, parsed, lambda name: True)


def test_embedding_of_a_pure_low_bit_file_needs_importance() -> None:
    target = parse_target("IQ2_XXS")
    choices = [Choice("token_embd.weight", type_by_name("IQ2_XXS"))]
    assert unmet_importance(choices, target, lambda name: False) == choices
