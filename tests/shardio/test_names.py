"""Wrapper prefixes come off, and nothing else does."""

from __future__ import annotations

import pytest
from mconv.shardio.names import strip_wrappers, stripped


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module.lm_head.weight", "lm_head.weight"),
        ("module.module.norm.weight", "norm.weight"),
        ("_orig_mod.model.layers.0.w", "model.layers.0.w"),
        ("module._orig_mod.model.norm.weight", "model.norm.weight"),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.w", "model.layers.0.w"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.w", "model.layers.0.mlp.w"),
        ("_forward_module.model.w", "model.w"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("weight", "weight"),
    ],
)
def test_strip(name: str, bare: str) -> None:
    assert strip_wrappers(name) == bare


def test_colliding_names_stay() -> None:
    assert stripped(["a", "module.a"]) == {"a": "a", "module.a": "module.a"}
    assert stripped(["module.a", "module.b"]) == {"module.a": "a", "module.b": "b"}
