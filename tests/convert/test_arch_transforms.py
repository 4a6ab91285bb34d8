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
     "head": st.sampled_from([2, 4, 6]), "groups": st.integers(1, 3),
     "nope": st.integers(1, 4), "v": st.integers(1, 4)}
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


def pairs(x: np.ndarray, count: int) -> np.ndarray:
    """Bring rotary halves into adjacent pairs."""
    return x.reshape(count, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def three(x: np.ndarray, s: Sizes) -> list[np.ndarray]:
    q, k, v = np.split(x, [s["q"], s["q"] + s["kv"]])
    return [pairs(q, s["heads"]), pairs(k, s["kv_heads"]), v]


def tile(x: np.ndarray, s: Sizes, width: int) -> np.ndarray:
    """Order value heads by plain indexing."""
    keys, ratio = s["kv_heads"], s["ratio"]
    rows = [
        (key * ratio + r) * width + i
        for r in range(ratio)
        for key in range(keys)
        for i in range(width)
    ]
    return x[rows]


def tile_last(x: np.ndarray, s: Sizes) -> np.ndarray:
    first = 2 * s["kv_heads"] * s["key_head"]
    return np.concatenate([x[:first], tile(x[first:], s, s["v"])])


def four(x: np.ndarray, s: Sizes) -> list[np.ndarray]:
    keys, value = s["kv_heads"], s["ratio"] * s["v"]
    widths = [s["key_head"], s["key_head"], value, value]
    parts: list[list[np.ndarray]] = [[], [], [], []]
    at = 0
    for _ in range(keys):
        for part, width in zip(parts, widths, strict=True):
            part.append(x[at : at + width])
            at += width
    return [np.concatenate([*parts[0], *parts[1], *parts[2]]), np.concatenate(parts[3])]


def linear_rows(s: Sizes) -> int:
    return 2 * s["kv_heads"] * s["key_head"] + s["heads"] * s["v"]


CASES |= {
    "split_qkv_pairs": (lambda s: [(s["q"] + 2 * s["kv"], 3)], lambda x, s: three(x[0], s)),
    "ungroup_qkv_pairs": (
        lambda s: [(s["q"] + 2 * s["kv"], 3)],
        lambda x, s: three(grouped(x[0], s), s),
    ),
    "stack_others": (lambda s: [(2, 3)] * s["groups"], lambda x, s: [np.stack(x)]),
    "column": (lambda s: [(4,)], lambda x, s: [x[0][:, None]]),
    "squeeze": (lambda s: [(4, 1, 3)], lambda x, s: [x[0][:, 0]]),
    "by_group": (lambda s: [(2 * s["groups"],)], lambda x, s: [x[0].reshape(s["groups"], 2)]),
    "tiled": (lambda s: [(s["heads"], 2)], lambda x, s: [tile(x[0], s, 1)]),
    "tiled_heads": (lambda s: [(s["heads"] * s["v"], 2)], lambda x, s: [tile(x[0], s, s["v"])]),
    "tiled_columns": (
        lambda s: [(2, s["heads"] * s["v"])],
        lambda x, s: [tile(x[0].T, s, s["v"]).T],
    ),
    "tiled_values": (lambda s: [(linear_rows(s), 2)], lambda x, s: [tile_last(x[0], s)]),
    "squeeze_tiled_values": (
        lambda s: [(linear_rows(s), 1, 3)],
        lambda x, s: [tile_last(x[0][:, 0], s)],
    ),
    "split_qkvz": (
        lambda s: [(2 * s["kv_heads"] * s["key_head"] + 2 * s["heads"] * s["v"], 2)],
        lambda x, s: four(x[0], s),
    ),
}
#: Those with tests of their own.
OTHERS = {"from_first_position", "fill_rows", "mxfp4", "mxfp4_alternating_gate_up", "ternary"} | {
    f"negative_exp{how}" for how in ("", "_column", "_tiled")
}


def test_every_transform_has_a_case() -> None:
    assert {*CASES, *OTHERS} == set(TRANSFORMS)


def test_rows_of_embeddings() -> None:
    rows = from_array(np.arange(10, dtype=np.float32).reshape(5, 2))
    sizes = {"first_position": 2, "vocab": 7}
    [cut] = TRANSFORMS["from_first_position"].apply([rows], sizes)
    np.testing.assert_array_equal(cut.read(), rows.read()[2:])
    [back] = TRANSFORMS["from_first_position"].undo([cut], sizes)
    np.testing.assert_array_equal(back.read(), [[0, 0], [0, 0], [4, 5], [6, 7], [8, 9]])
    [full] = TRANSFORMS["fill_rows"].apply([rows], sizes)
    np.testing.assert_array_equal(full.read(), [*rows.read(), [0, 0], [0, 0]])
    with pytest.raises(ValueError, match="5 rows"):
        TRANSFORMS["fill_rows"].apply([rows], {"vocab": 3})


@given(keys=st.integers(1, 3), ratio=st.integers(1, 3))
def test_negative_exponentials(keys: int, ratio: int) -> None:
    count = keys * ratio
    sizes = {"key_heads": keys, "value_heads": count, "kv_heads": keys, "ratio": ratio}
    values = np.log(np.arange(1, count + 1, dtype=np.float32))
    for name, want in (
        ("negative_exp", -np.arange(1.0, count + 1)),
        ("negative_exp_column", -np.arange(1.0, count + 1)[:, None]),
        ("negative_exp_tiled", tile(-np.arange(1.0, count + 1), sizes, 1)),
    ):
        [there] = TRANSFORMS[name].apply([from_array(values)], sizes)
        assert there.dtype == np.float32
        np.testing.assert_allclose(there.read(), want, rtol=1e-6)
        [back] = TRANSFORMS[name].undo([there], sizes)
        np.testing.assert_allclose(back.read(), values, atol=1e-6)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 9))
def test_ternary_weights(rows: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    [made] = TRANSFORMS["ternary"].apply([from_array(values)], {})
    mean = np.abs(values).mean(dtype=np.float64)
    want = np.clip(np.rint(values / mean), -1, 1) * mean
    np.testing.assert_allclose(made.read(), want, rtol=1e-6)
    np.testing.assert_array_equal(made.read([slice(0, 1)]), made.read()[:1])


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
    sizes |= {"key_heads": kv, "value_heads": sizes["heads"], "value_head": drawn["v"]}
    sizes |= {"key_head": drawn["nope"], "others": drawn["groups"]}
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
