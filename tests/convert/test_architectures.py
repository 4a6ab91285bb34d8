"""Architecture records: the contract every one keeps, transforms, and configuration defaults."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mconv.convert.architectures import (
    TRANSFORMS,
    Architecture,
    architectures,
    complete_config,
    dimensions,
    find_architecture,
    model_entries,
)
from mconv.errors import ConfigError, UnsupportedError
from mconv.shardio import from_array

ALL = architectures()
LAYER_TAGS = {
    "dense",
    "moe",
    "main",
    "mtp",
    "first_mtp",
    "full",
    "linear",
    "local",
    "wide",
    "narrow",
    "encoder",
    "decoder",
}
ROPE_OLD = {
    "rope_theta": 5e5,
    "max_position_embeddings": 512,
    "rope_scaling": {"type": "yarn", "factor": 2.0},
}


def entries(architecture: Architecture, **config: Any) -> dict[str, Any]:
    kind = next(iter(architecture.defaults))
    full = complete_config({"model_type": kind, **config}, architecture)
    return {e.key: e.value for e in model_entries(architecture, full, 1)}


def completed(record: Architecture) -> dict[str, Any]:
    return complete_config({"model_type": next(iter(record.defaults))}, record)


@pytest.mark.parametrize("name", ALL)
def test_contract(name: str) -> None:
    record = ALL[name]
    assert record.classes and record.defaults
    permuted = any(rule.transform == "permute_q" for rule in record.tensors)
    assert record.rope in ("norm", "neox", "") and (record.rope == "norm" or not permuted)
    assert set(record.headless) <= set(record.classes) >= set(record.composite)
    sizes = dimensions(record, completed(record))
    for rule in record.tensors:
        assert set(rule.shape) <= set(sizes), rule
        assert rule.bias in ("no", "maybe", "yes")
        assert rule.transform in TRANSFORMS
        in_layer = rule.hf.startswith("mtp.") or "{n}" in rule.hf
        assert ("{n}" in rule.outputs[0]) == in_layer
        assert set(rule.layers.split()) <= LAYER_TAGS
    names = [(rule.hf, rule.layers) for rule in record.tensors]
    assert len(set(names)) == len(names)
    for model_class in record.classes:
        assert find_architecture({"architectures": [model_class]}) is record


def test_records_do_not_share_classes() -> None:
    for what in ("classes", "defaults"):
        names = [name for record in ALL.values() for name in getattr(record, what)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ALL)
def test_tensor_names_are_those_of_the_gguf_package(name: str) -> None:
    import gguf

    record = ALL[name]
    kind = next((k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == record.name), None)
    if kind is None:
        pytest.skip(f"this version of the gguf package does not have {record.name}")
    tensors = {gguf.TENSOR_NAMES[t].replace("{bid}", "{n}") for t in gguf.MODEL_TENSORS[kind]}
    mapping = gguf.get_tensor_name_map(kind, 1)
    for rule in record.tensors:
        for output in rule.outputs:
            stem = re.sub(r"\.(weight|bias|scale)$", "", output)
            assert stem in tensors or ".nextn." in stem  # not all versions list those
        theirs = mapping.get_name(re.sub(r"[._]\{[aehkq]\}", "", rule.hf).replace("{n}", "0"))
        if theirs is not None and len(rule.outputs) == 1:
            assert theirs == rule.outputs[0].replace("{n}", "0").removesuffix(".weight")


@pytest.mark.parametrize("name", ALL)
def test_defaults_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    known = [kind for kind in ALL[name].defaults if kind in transformers.CONFIG_MAPPING]
    if not known:
        pytest.skip("transformers does not have it")
    for model_type in known:
        theirs = transformers.AutoConfig.for_model(model_type).to_dict()
        ours = complete_config({"model_type": model_type}, ALL[name])
        if "n_embd" in ours and "n_embd" not in theirs and "n_positions" not in theirs:
            continue  # the hub's own code has other names than transformers
        for key in ALL[name].defaults[model_type]:
            if key in theirs and key not in (
                "rope_theta",
                "rope_local_base_freq",
                "partial_rotary_factor",
                "rotary_pct",
            ):
                assert ours[key] == theirs[key], (model_type, key)
        assert not ALL[name].rope or ours["rope_parameters"] == theirs["rope_parameters"]
        if ALL[name].attention:
            assert ("head_dim" in ours) == ("head_dim" in theirs)


@pytest.mark.parametrize("name", ["permute_q", "permute_k"])
@given(heads=st.integers(1, 5), half=st.integers(1, 4), columns=st.integers(0, 3))
def test_rotary_pairs_become_adjacent(name: str, heads: int, half: int, columns: int) -> None:
    shape = (heads * half * 2, *([columns] if columns else []))
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    sizes = {"heads": heads, "kv_heads": heads}
    [there] = TRANSFORMS[name].apply([from_array(values)], sizes)
    rows = there.read().reshape(heads, half, 2, -1)
    source = values.reshape(heads, 2, half, -1)
    for part in (0, 1):  # adjacent rows are the two halves of a rotary pair
        np.testing.assert_array_equal(rows[:, :, part], source[:, part])


def test_old_and_new_rope_settings_mean_the_same() -> None:
    new = {
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 2.0,
            "original_max_position_embeddings": 512,
        },
    }
    assert entries(ALL["qwen2"], **ROPE_OLD) == entries(ALL["qwen2"], **new)


def test_rope_scaling_keys() -> None:
    yarn = {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "extrapolation_factor": 0.5}
    found = entries(
        ALL["llama"], **ROPE_OLD | {"rope_scaling": {"rope_type": "yarn", "factor": 2, **yarn}}
    )
    scaling = {k.removeprefix("llama.rope.scaling."): v for k, v in found.items() if "scaling" in k}
    assert scaling == {
        "type": "yarn",
        "factor": 2.0,
        "original_context_length": 512,
        "yarn_ext_factor": 0.5,
        "yarn_attn_factor": 1.5,
        "yarn_beta_fast": 16.0,
        "yarn_beta_slow": 2.0,
    }
    linear = entries(ALL["llama"], rope_scaling={"type": "linear", "factor": 4.0})
    assert linear["llama.rope.scaling.type"] == "linear"
    assert linear["llama.rope.scaling.factor"] == 4.0
    assert not [k for k in entries(ALL["llama"]) if "scaling" in k]


def test_text_config_wins() -> None:
    full = complete_config({"hidden_size": 1, "text_config": {"hidden_size": 64}}, ALL["llama"])
    assert full["hidden_size"] == 64


@pytest.mark.parametrize(
    "bad",
    [
        {"hidden_size": "64"},
        {"num_hidden_layers": 0},
        {"vocab_size": True},
        {"rope_scaling": 3},
    ],
)
def test_bad_configurations(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        complete_config({"model_type": "llama", **bad}, ALL["llama"])


def test_who_is_refused() -> None:
    with pytest.raises(ConfigError, match="--config"):
        find_architecture(None)
    with pytest.raises(UnsupportedError, match="MptForCausalLM"):
        find_architecture({"architectures": ["MptForCausalLM"]})
    assert find_architecture({"model_type": "mistral"}).name == "llama"
