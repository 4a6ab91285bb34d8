"""The transforms between Hugging Face and GGUF tensors: what numpy says, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mconv.convert.architectures import TRANSFORMS
from mconv.shardio import from_array

SIZES = st.fixed_dictionaries(
    {"experts": st.integers(1, 4), "kv_heads": st.integers(1, 3), "ratio": st.integers(1, 3),
     "head": st.sampled_from([2, 4, 6]), "nope": st.integers(1, 4), "v": st.integers(1, 4)}
)  # fmt: skip
Sizes = Mapping[str, int]
Shapes = Callable[[Sizes], list[tuple[int, ...]]]
Truth = Callable[[list[np.ndarray], Sizes], list[np.ndarray]]


def grouped(x: np.ndarray, s: Sizes) -> np.ndarray:
    """Reorder query groups by plain indexing."""
    ratio, d = s["heads"] // s["kv_heads"], s["head"]
    group = (ratio + 2) * d
    q = [g * group + i for g in range(s["kv_heads"]) for i in range(ratio * d)]
    k, v = (
        [g * group + (ratio + which) * d + i for g in range(s["kv_heads"]) for i in range(d)]
        for which in (0, 1)
    )
    return x[[*q, *k, *v]]


def latent(x: np.ndarray, s: Sizes) -> list[np.ndarray]:
    view = x.reshape(s["heads"], s["nope"] + s["v"], -1)
    return [view[:, : s["nope"]].swapaxes(1, 2), view[:, s["nope"] :]]


CASES: dict[str, tuple[Shapes, Truth]] = {
    "": (lambda s: [(3, 2)], lambda x, s: x),
    "stack": (lambda s: [(2, 3)] * s["experts"], lambda x, s: [np.stack(x)]),
    "stack_heads": (lambda s: [(5,)] * s["heads"], lambda x, s: [np.stack(x)]),
    "stack_kv_heads": (lambda s: [(5,)] * s["kv_heads"], lambda x, s: [np.stack(x)]),
    "transpose": (lambda s: [(4, 3)], lambda x, s: [x[0].T]),
    "split_gate_up": (
        lambda s: [(s["experts"], 6, 4)],
        lambda x, s: [x[0][:, :3], x[0][:, 3:]],
    ),
    "transpose_split_gate_up": (
        lambda s: [(s["experts"], 4, 6)],
        lambda x, s: [x[0][..., :3].swapaxes(1, 2), x[0][..., 3:].swapaxes(1, 2)],
    ),
    "transpose_alternating_gate_up": (
        lambda s: [(s["experts"], 4, 6)],
        lambda x, s: [x[0][..., ::2].swapaxes(1, 2), x[0][..., 1::2].swapaxes(1, 2)],
    ),
    "alternating_gate_up": (
        lambda s: [(s["experts"], 6)],
        lambda x, s: [x[0][:, ::2], x[0][:, 1::2]],
    ),
    "ungroup_qkv": (
        lambda s: [((s["heads"] + 2 * s["kv_heads"]) * s["head"], 3)],
        lambda x, s: [grouped(x[0], s)],
    ),
    "split_kv_b": (
        lambda s: [(s["heads"] * (s["nope"] + s["v"]), 3)],
        lambda x, s: latent(x[0], s),
    ),
    "plus_one": (lambda s: [(7,)], lambda x, s: [x[0] + np.float32(1)]),
    "permute_q": (
        lambda s: [(s["heads"] * s["head"], 3)],
        lambda x, s: [
            x[0].reshape(s["heads"], 2, -1, 3).swapaxes(1, 2).reshape(x[0].shape)
        ],
    ),
    "permute_k": (
        lambda s: [(s["kv_heads"] * s["head"],)],
        lambda x, s: [x[0].reshape(s["kv_heads"], 2, -1).swapaxes(1, 2).reshape(-1)],
    ),
}  # fmt: skip


def test_every_transform_has_a_case() -> None:
    assert {*CASES, "mxfp4", "mxfp4_alternating_gate_up"} == set(TRANSFORMS)


#: The sixteen values of four bits (OCP Microscaling formats, E2M1).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@given(experts=st.integers(1, 2), pairs=st.integers(1, 3), blocks=st.integers(1, 3))
def test_mxfp4(experts: int, pairs: int, blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    shape = (experts, 2 * pairs, blocks)
    data = rng.integers(0, 256, (*shape, 16), np.uint8)
    scales = rng.integers(120, 135, shape, np.uint8)
    values = np.stack([E2M1[data & 15], E2M1[data >> 4]], -1).reshape(*shape, 32)
    values = (values * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(
        experts, 2 * pairs, 32 * blocks
    )
    sources = [from_array(data), from_array(scales)]
    for name, want in (
        ("mxfp4", [values]),
        ("mxfp4_alternating_gate_up", [values[:, ::2], values[:, 1::2]]),
    ):
        there = TRANSFORMS[name].apply(sources, {})
        for ours, theirs in zip(there, want, strict=True):
            np.testing.assert_array_equal(ours.read(), theirs)
            np.testing.assert_array_equal(ours.read([slice(0, 1)])[..., 5:], theirs[:1, ..., 5:])
        for ours, theirs in zip(TRANSFORMS[name].undo(there, {}), (data, scales), strict=True):
            np.testing.assert_array_equal(ours.read(), theirs)
    with pytest.raises(ValueError, match="expected uint8"):
        TRANSFORMS["mxfp4"].apply([from_array(data[..., :8]), from_array(scales)], {})


@pytest.mark.parametrize("name", CASES)
@given(drawn=SIZES)
def test_there_and_back(name: str, drawn: dict[str, int]) -> None:
    shapes, truth = CASES[name]
    kv = drawn["kv_heads"]
    sizes = {**drawn, "heads": kv * drawn["ratio"]}
    sizes |= {"q": sizes["heads"] * drawn["head"], "kv": kv * drawn["head"]}
    given_ = [
        np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1000 * i
        for i, shape in enumerate(shapes(sizes))
    ]
    there = TRANSFORMS[name].apply([from_array(x) for x in given_], sizes)
    for ours, theirs in zip(there, truth(given_, sizes), strict=True):
        np.testing.assert_array_equal(ours.read(), theirs)
    back = TRANSFORMS[name].undo(there, sizes)
    for ours, theirs in zip(back, given_, strict=True):
        np.testing.assert_array_equal(ours.read(), theirs)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("permute_q", (7, 2)),
        ("split_gate_up", (2, 3, 4)),
        ("alternating_gate_up", (2, 5)),
        ("ungroup_qkv", (5, 2)),
        ("split_kv_b", (5, 2)),
    ],
)
def test_misfits_are_refused(name: str, shape: tuple[int, ...]) -> None:
    sizes = {"heads": 2, "kv_heads": 2, "head": 2, "nope": 1, "v": 2, "experts": 3}
    with pytest.raises(ValueError, match=r"rows|reshape"):
        TRANSFORMS[name].apply([from_array(np.zeros(shape, np.float32))], sizes)


def test_half_precision_stays_half() -> None:
    values = np.array([2048.0, 0.1, -1.0], np.float16)
    [out] = TRANSFORMS["plus_one"].apply([from_array(values)], {})
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out.read(), values + np.float16(1))
