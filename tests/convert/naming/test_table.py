"""Tables are total: what is unknown, missing or misshapen is all reported in one message."""

from __future__ import annotations

import numpy as np
import pytest
from mconv.convert.naming.table import Rule, Table, rule
from mconv.convert.naming.transforms import Sizes
from mconv.errors import ConfigError
from mconv.shardio.tensor import LazyTensor, from_array

SIZES = Sizes(
    layers=2, heads=2, kv_heads=1, head_dim=2, vocab_size=3, padded_vocab_size=5, experts=2
)
TABLE = Table(
    "toy",
    (
        rule("emb", "embed.weight", "trim_vocab", "embedding"),
        rule("head", "lm.weight", "trim_vocab", "head"),
        rule("l.{i}.norm", "h.{i}.norm", "norm", "norm"),
        rule("l.{i}.fc", ("h.{i}.gate", "h.{i}.up"), "split_gate_up", "router|MLP"),
        rule("l.{i}.x.{e}.fc", "h.{i}.experts.{e}", "same", "MLP"),
        rule("l.{i}.router", "h.{i}.router", "same", "router"),
        rule("l.{i}.stack.{e}", "h.{i}.stacked", "stack_experts"),
        Rule(("l.{i}.a", "l.{i}.b"), ("h.{i}.ab",), "same"),
    ),
)


def tensor(*shape: int) -> LazyTensor:
    return from_array(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))


def toy() -> dict[str, LazyTensor]:
    """Layer 0 dense, layer 1 with experts."""
    return {
        "emb": tensor(5, 2),
        "head": tensor(5, 2),
        "l.0.norm": tensor(2),
        "l.0.fc": tensor(4, 2),
        "l.1.norm": tensor(2),
        "l.1.x.0.fc": tensor(2, 2),
        "l.1.x.1.fc": tensor(2, 2),
        "l.1.router": tensor(2, 2),
        "l.1.stack.0": tensor(3),
        "l.1.stack.1": tensor(3),
    }


def test_both_directions() -> None:
    there = TABLE.to_hf(toy(), SIZES)
    assert set(there) == {
        "embed.weight", "lm.weight", "h.0.norm", "h.0.gate", "h.0.up", "h.1.norm", "h.1.experts.0",
        "h.1.experts.1", "h.1.router", "h.1.stacked",
    }  # fmt: skip
    assert there["embed.weight"].shape == (3, 2)
    assert there["h.1.stacked"].shape == (2, 3)
    back = TABLE.from_hf(there, SIZES)
    assert set(back) == set(toy())
    assert back["l.1.stack.1"].shape == (3,)
    assert TABLE.rename("head") == "lm.weight"
    assert TABLE.rename("h.7.norm", forward=False) == "l.7.norm"
    assert TABLE.rename("l.0.fc") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"l.0.nrom": (2,)}, r"unknown: l\.0\.nrom \[2\] \(did you mean 'l\.0\.norm'\?\)"),
        ({"l.1.norm": None}, "missing: the norm of layer 1"),
        ({"l.0.fc": None}, r"missing: the router of layer 0.*missing: the MLP of layer 0"),
        ({"l.1.router": None}, "missing: the router of layer 1"),
        ({"l.1.x.1.fc": None}, r"missing: the MLP of experts \[1\] in layer 1"),
        ({"l.1.x.2.fc": (2, 2)}, "expert 2 is beyond the 2 of layer 1"),
        ({"l.2.norm": (2,)}, "layer 2 is beyond the model's 2 layers"),
        ({"head": None}, "missing: the head"),
        ({"emb": (2, 2)}, r"emb \[2, 2\]: 2 rows are fewer"),
        ({"l.0.fc": (3, 2)}, r"l\.0\.fc \[3, 2\]: 3 rows do not divide"),
        ({"l.1.stack.1": None}, r"missing: l\.1\.stack\.1"),
        ({"l.0.a": (1,)}, r"missing: l\.0\.b"),
    ],
)
def test_misfits_are_reported(change: dict[str, tuple[int, ...] | None], says: str) -> None:
    tensors = toy()
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = tensor(*shape)
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        TABLE.to_hf(tensors, SIZES)


def test_all_problems_are_in_one_message() -> None:
    tensors = toy() | {"strange": tensor(1)}
    del tensors["l.0.norm"]
    with pytest.raises(ConfigError, match=r"(?s)^2 tensors.*unknown: strange.*norm of layer 0"):
        TABLE.to_hf(tensors, SIZES)


def test_states_may_be_partial_and_moments_keep_their_values() -> None:
    sizes = Sizes(
        layers=2, heads=2, kv_heads=1, head_dim=2, vocab_size=3, padded_vocab_size=5,
        zero_centered_norm=True,
    )  # fmt: skip
    part = {"l.0.norm": from_array(np.zeros(2, np.float32))}
    assert TABLE.to_hf(part, sizes, "exp_avg")["h.0.norm"].read().tolist() == [0, 0]
    assert TABLE.to_hf(part, sizes, "master")["h.0.norm"].read().tolist() == [1, 1]
    with pytest.raises(ConfigError, match="unknown"):
        TABLE.to_hf({"strange": tensor(1)}, sizes, "exp_avg")
