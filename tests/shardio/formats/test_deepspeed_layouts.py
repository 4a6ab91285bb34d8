"""The arithmetic of DeepSpeed's layouts against numpy: ZeRO partitions of random models, and every
tensor-parallel rule as an invertible cut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.errors import FormatError, MconvError, UnsupportedError
from mconv.shardio.coverage import prove
from mconv.shardio.deepspeed import combine, zero0, zero3, zero12
from mconv.shardio.deepspeed.affine import read_affine
from mconv.shardio.deepspeed.fields import Fields
from mconv.shardio.deepspeed.fused import Average, Blocks
from mconv.shardio.deepspeed.patterns import Patterns
from mconv.shardio.deepspeed.states import ModelState, OptimState
from mconv.shardio.deepspeed.tensor_parallel import Rules, read_rules
from mconv.shardio.records import Storage, StoredTensor
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.source import FileSource
from mconv.shardio.tensor import from_array
from safetensors.numpy import load_file

SHAPES = st.lists(
    st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6
)


def stored(path: Path, array: np.ndarray) -> StoredTensor:
    """Write an array to a file of its own and describe it as the unpickler would."""
    path.write_bytes(array.tobytes())
    storage = Storage("0", array.dtype, array.nbytes, 0, path)
    return StoredTensor(array.dtype, array.shape, (1,) * array.ndim, 0, storage)


def rank(folder: Path, dp: int, world: int, stage: int, **parts: object) -> OptimState:
    path = folder / f"rank{dp}"
    master = stored(path, parts.pop("master"))
    return OptimState(
        path=path, source=FileSource.of(path), dp=dp, mp=0, stage=stage, counts=(world,),
        masters=(master,), states=({},), steps=(None,), gaps=parts.get("gaps"),
        slices=parts.get("slices"), param_groups=(), fields=Fields(path, {}),
    )  # fmt: skip


def model_of(shapes: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"p{k}": rng.standard_normal(s).astype(np.float32) for k, s in enumerate(shapes)}


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 5), st.booleans(), st.booleans())
def test_zero12_partitions(
    shapes: list[tuple[int, ...]], world: int, lean: bool, aligned: bool
) -> None:
    params = model_of(shapes)
    gaps = [0] * len(shapes)
    flat: list[np.ndarray] = []
    at = 0
    for k, p in enumerate(params.values()):
        at += p.size
        gaps[k] = -at % 4 if aligned and k + 1 < len(shapes) else 0
        at += gaps[k]
        flat += [p.reshape(-1), np.zeros(gaps[k], np.float32)]
    whole = np.concatenate(flat)
    size = -(-whole.size // (2 * world)) * 2
    padded = np.concatenate([whole, np.full(size * world - whole.size, 7, np.float32)])
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for r in range(world):
            part = padded[r * size : (r + 1) * size]
            keep = max(0, min(size, whole.size - r * size)) if lean else size
            ranks.append(rank(Path(folder), r, world, 1, master=part[:keep], gaps=(tuple(gaps),)))
        group = zero12.make_group(0, {n: p.shape for n, p in params.items()}, ranks)
        found = zero12.read_group(group, None)["master"]
        prove(found)
        for name, want in params.items():
            assert np.array_equal(found[name].read(), want)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 5))
def test_zero3_partitions(shapes: list[tuple[int, ...]], world: int) -> None:
    params = model_of(shapes)
    vectors: list[list[np.ndarray]] = [[] for _ in range(world)]
    for p in params.values():
        per = -(-p.size // world)
        padded = np.concatenate([p.reshape(-1), np.full(per * world - p.size, np.nan, np.float32)])
        for r in range(world):
            vectors[r].append(padded[r * per : (r + 1) * per])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            rank(Path(folder), r, world, 3, master=np.concatenate(v)) for r, v in enumerate(vectors)
        ]
        table = {n: p.shape for n, p in params.items()}
        found = zero3.read_subgroup(0, table, ranks)["master"]
        prove(found)
        for name, want in params.items():
            assert np.array_equal(found[name].read(), want)


def test_slices_tell_swapped_partitions(tmp_path: Path) -> None:
    table = {"a": (3, 4), "b": (5,)}
    first = {"a": (0, 10)}
    second = {"a": (0, 2), "b": (2, 5)}
    data = np.arange(10, dtype=np.float32)
    good = [
        rank(tmp_path, r, 2, 1, master=data, slices=(s,)) for r, s in enumerate((first, second))
    ]
    zero12.read_group(zero12.make_group(0, table, good), None)
    bad = [rank(tmp_path, r, 2, 1, master=data, slices=(s,)) for r, s in enumerate((second, first))]
    with pytest.raises(FormatError, match="holds partition 1"):
        zero12.read_group(zero12.make_group(0, table, bad), None)


def test_quantized_frozen_parameters_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    fragment = stored(path, np.zeros(4, np.int8))
    model = ModelState(
        path=path, source=FileSource.of(path), module={}, buffers=frozenset(), groups=(),
        frozen_shapes={"w": (4,)}, frozen={"w": fragment}, shared={}, fields=Fields(path, {}),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="scales"):
        zero3.read_frozen([model])


@pytest.mark.parametrize("widths", [((3, 2), (1, 1)), ((4, 4), (2, 0), (1, 3))])
def test_blocks_invert(widths: tuple[tuple[int, ...], ...]) -> None:
    full = np.random.default_rng(1).standard_normal((sum(map(sum, widths)), 3))
    tensor, placement = from_array(full), Blocks(0, widths)
    parts = [placement.cut(tensor, r, 2) for r in range(2)]
    assert np.array_equal(placement.assemble(parts).read(), full)


def test_average_is_the_float32_mean() -> None:
    parts = [np.array([1.0, 2.5], np.float32), np.array([2.0, 0.5], np.float32)]
    mean = Average().assemble([from_array(p) for p in parts])
    assert np.array_equal(mean.slice([slice(1, 2)]).read(), np.float32([1.5]))


def test_affine_map_with_pieces_out_of_order() -> None:
    """Two heads dealt to two ranks alternately, as AutoTP does for fused q and k."""
    full = np.arange(24, dtype=np.float32).reshape(8, 3)
    rows = {0: [0, 4], 1: [2, 6]}
    ranks = {
        str(r): {
            "shard_shape": [4, 3],
            "pieces": [
                {"shape": [2, 3], "source": [row * 3, [3, 1]], "dest": [k * 6, [3, 1]]}
                for k, row in enumerate(starts)
            ],
        }
        for r, starts in rows.items()
    }
    entry = {"version": 1, "params": {"^w$": {"logical_shape": [8, 3], "ranks": ranks}}}
    placement = read_affine(entry, "test")["^w$"]
    parts = [placement.cut(from_array(full), r, 2) for r in range(2)]
    assert np.array_equal(parts[1].read(), full[[2, 3, 6, 7]])
    assert np.array_equal(placement.assemble(parts).read(), full)
    ranks["0"]["pieces"][0]["source"] = [0, [1, 3]]
    with pytest.raises(UnsupportedError, match="no box"):
        read_affine(entry, "test")
    with pytest.raises(FormatError, match="malformed"):
        read_affine({"version": 1, "params": {"^w$": {}}}, "test")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", r"(a)\1", ".*.*.*.*.*", "", "(", None])
def test_slow_patterns_are_refused(pattern: str | None) -> None:
    with pytest.raises(FormatError):
        Patterns([(pattern, 1)], "test")


def test_patterns_match_the_start() -> None:
    table = Patterns([(r"^a\.b$", 1), (r"\d+\.w", 2)], "test")
    assert [table.get(n) for n in ("a.b", "axb", "12.weight", "a.b.c")] == [1, None, 2, None]
    assert "a.b" in table and "c" not in table


def test_rules_by_name_equal_the_rules_of_the_file(
    fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = fixtures_dir / "deepspeed" / "autotp2_dp2_z1_bf16"
    hints = {"vocab_size": 160}
    monkeypatch.setattr(combine, "rules_of", lambda *_: read_rules(None, "test", hints))
    ckpt = open_checkpoint(case / "ckpt")
    for key, want in load_file(case / "truth.safetensors").items():
        kind, name = key.split("/", 1)
        state = "master" if kind == "fp32" else kind
        assert np.array_equal(ckpt.optimizer[state][name].read(), want), key


def test_unknown_layers_are_not_guessed() -> None:
    with pytest.raises(UnsupportedError, match=r"nothing says how 'mystery\.weight'"):
        read_rules(None, "test", {}).placement("mystery.weight", [(4, 4), (4, 4)])


def rules(**info: object) -> Rules:
    return read_rules({"universal_checkpoint_version": 0.2, **info}, "test", {})


def fused(shape: list[object], dim: int = 0) -> list[dict[str, object]]:
    return [{"patterns": [r"\d+\.qkv"], "shape": shape, "partition_dim": dim}]


@pytest.mark.parametrize(
    ("info", "parts", "want"),
    [
        ({}, [(4, 2), (4, 2)], "Shard(0)"),
        ({"parameter_with_row_parallelism_patterns": ["0.qkv"]}, [(4, 2)] * 2, "Shard(1)"),
        ({"parameter_with_row_parallelism_patterns": ["0.qkv"]}, [(4,)] * 2, "Shard(0)"),
        ({"tp_replicated_parameter_patterns": ["0.qkv"]}, [(4, 2)] * 2, "Replicate"),
        ({"parameter_to_average_patterns": ["0.qkv"]}, [(4, 2)] * 2, "Average"),
        ({"parameter_with_2_sub_params_cat_dim_0": ["0.qkv"]}, [(4, 2)] * 2, "Fused(0, 4+4)"),
        ({"parameter_with_sub_params": fused([3, -1])}, [(6, 2)] * 2, "Fused(0, 4+4+4)"),
        ({"parameter_with_sub_params": fused([3, -1])}, [(6,)] * 2, "Fused(0, 4+4+4)"),
        ({"parameter_with_sub_params": fused([[8, 2, 2], 2])}, [(6, 2)] * 2, "Fused(0, 8+2+2)"),
        (
            {
                "parameter_with_sub_params": fused([[3, 3], 2]),
                "sub_param_shard_widths": {r"\d+\.qkv": [[2, 1], [2, 1]]},
            },
            [(4, 2), (2, 2)],
            "Blocks(0, 3+3)",
        ),
    ],
)
def test_rules(info: dict[str, object], parts: list[tuple[int, ...]], want: str) -> None:
    assert str(rules(**info).placement("0.qkv", parts)) == want


@pytest.mark.parametrize(
    "info",
    [
        {"parameter_with_sub_params": fused([[3, 3], 2])},
        {"parameter_with_sub_params": fused([[4, 4], 2])},
        {"parameter_with_sub_params": fused([2, 2, 2], 2)},
        {"autotp_unsupported_parameter_patterns": {"0.qkv": "packed by blocks"}},
    ],
)
def test_rules_that_cannot_be_applied(info: dict[str, object]) -> None:
    with pytest.raises(MconvError, match=r"0\.qkv"):
        rules(**info).placement("0.qkv", [(3, 2), (3, 2)])


@pytest.mark.parametrize(
    "info",
    [
        {"parameter_with_sub_params": [{"patterns": ["x"], "shape": [2], "partition_dim": 5}]},
        {"parameter_with_sub_params": "no list"},
        {"sub_param_shard_widths": {"x": [["a"]]}},
        {"affine_map": {"version": 1}},
    ],
)
def test_malformed_rules(info: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        rules(**info)


@pytest.mark.parametrize(
    ("shapes", "want"),
    [
        ([(4, 2), (3,), (2, 2)], ["a", "b", "d"]),  # c was frozen, nothing else fits
        ([(4, 2), (3,)], None),  # b or c
        ([(2, 2), (3,)], None),  # not in this order
        ([(4, 2), (3,), (3,), (2, 2)], ["a", "b", "c", "d"]),
    ],
)
def test_stage_0_states_with_frozen_parameters(
    shapes: list[tuple[int, ...]], want: list[str] | None
) -> None:
    names = {"a": (4, 2), "b": (3,), "e": (5,), "c": (3,), "d": (2, 2)}
    if want == ["a", "b", "d"]:
        names["c"] = (7,)
    found = zero0._without_frozen(names, [shapes])
    assert (None if found is None else list(found[0])) == want
    assert zero0._without_frozen(names, [shapes, shapes]) is None
