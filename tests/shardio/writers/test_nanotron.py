"""nanotron's folders: the very files that it writes, and optimizer states as it numbers them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mconv import Layout, open_checkpoint, reshard
from mconv.errors import LayoutError, UnsupportedError
from mconv.shardio.safetensors_header import read_header
from mconv.shardio.writers.nanotron import _Optimizers

from .families import family

torch = pytest.importorskip("torch")

EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
QKV = "model.decoder.0.pp_block.attn.qkv_proj.weight"


def content(folder: Path) -> dict[str, tuple[dict[str, str], tuple[int, ...], bytes]]:
    """Metadata, shape and data of each file; numpy's integers as plain ones."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        header = read_header(path)
        entry = header.tensors["data"]
        metadata = {k: re.sub(r"np\.int64\((\d+)\)", r"\1", v) for k, v in header.metadata.items()}
        data = path.read_bytes()[entry.start :]
        found[str(path.relative_to(folder))] = (metadata, entry.shape, data)
    return found


def test_the_files_are_those_of_nanotron(fixtures_dir: Path, tmp_path: Path) -> None:
    """What nanotron itself saved under tp=2, pp=2, read and written under the same layout."""
    source = fixtures_dir / "nanotron" / "nanotron_tp2_pp2" / "ckpt"
    reshard(source, tmp_path / "out", Layout("nanotron", tp=2, pp=2, pp_layers=(1, 1)))
    made = content(tmp_path / "out" / "2" / "model")
    wanted = content(source / "model")
    assert made.keys() == wanted.keys()
    for name, (metadata, shape, data) in wanted.items():
        assert made[name][1] == shape, name
        assert made[name][2] == data, name
        assert made[name][0] == metadata, name
    meta = json.loads((tmp_path / "out/2/checkpoint_metadata.json").read_text())
    theirs = json.loads((source / "checkpoint_metadata.json").read_text())
    assert meta.keys() == theirs.keys()
    assert meta["metas"].keys() == theirs["metas"].keys()
    assert meta["metas"]["data_stages"][0].keys() == theirs["metas"]["data_stages"][0].keys()


def written(tmp_path: Path, text: str, **options: Any) -> tuple[Any, Path]:
    ckpt = family("llama", layers=4, **options)
    reshard(ckpt, tmp_path / "out", Layout.parse(text))
    assert (tmp_path / "out" / "latest.txt").read_text() == "7"
    return ckpt, tmp_path / "out" / "7"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_a_rank_has_the_states_of_its_parts(tmp_path: Path) -> None:
    ckpt, folder = written(tmp_path, "nanotron:tp=2,pp=2")
    moment = {n: t.read() for n, t in ckpt.optimizer["exp_avg"].items()}
    state = load(folder / "optimizer" / "optimizer_pp-0-of-2_tp-1-of-2_exp-0-of-1.pt")
    number = {name: k for k, name in state["names"].items()}
    assert sorted(number.values()) == sorted(state["state"])
    groups = state["param_groups"]
    assert sorted([*groups[0]["params"], *groups[1]["params"]]) == sorted(state["state"])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert groups[0]["params"][0] == number[EMBEDDING] == 0
    parts = [moment[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"]
    want = np.concatenate([p[len(p) // 2 :] for p in parts])
    found = state["state"][number[QKV]]
    np.testing.assert_array_equal(found["exp_avg"].numpy(), want)
    assert found["step"] == 7
    down = "model.decoder.0.pp_block.mlp.down_proj.weight"
    masters = ckpt.optimizer["master"]["model.layers.0.mlp.down_proj.weight"].read()
    np.testing.assert_array_equal(state["gradient_accumulator"][down].numpy(), masters[:, 12:])
    schedule = load(folder / "lr_scheduler" / "lr_scheduler_pp-0-of-2_tp-1-of-2_exp-0-of-1.pt")
    assert schedule["last_epoch"] == 7
    assert len(schedule["lr_lambdas"]) == 2
    config = json.loads((folder / "optimizer" / "optimizer_config.json").read_text())
    assert config["type"] == "OptimizerFromGradientAccumulator"
    assert config["parallelism"]["pp_size"] == "2"


def test_zero_1_cuts_flat_ranges(tmp_path: Path) -> None:
    ckpt, folder = written(tmp_path, "nanotron:dp=3,zero_stage=1", dtype="float32")
    config = json.loads((folder / "optimizer" / "optimizer_config.json").read_text())
    assert config["type"] == "ZeroDistributedOptimizer"
    ranges = config["configs"]["param_name_to_dp_rank_offsets"]
    parts = []
    for dp in range(3):
        name = f"optimizer_pp-0-of-1_dp-{dp}-of-3_tp-0-of-1_exp-0-of-1.pt"
        state = load(folder / "optimizer" / name)
        assert "gradient_accumulator" not in state
        number = {n: k for k, n in state["names"].items()}
        part = state["state"][number[EMBEDDING]]["exp_avg"].numpy()
        lo, hi = map(int, ranges[EMBEDDING][str(dp)])
        assert part.shape == (hi - lo,)
        parts.append(part)
    want = ckpt.optimizer["exp_avg"]["model.embed_tokens.weight"].read()
    np.testing.assert_array_equal(np.concatenate(parts), want.ravel())


@given(st.integers(1, 500), st.integers(1, 17))
def test_ranges_are_those_of_nanotron(count: int, world: int) -> None:
    """Its own arithmetic: sizes rounded up, the last ranks one less."""
    sizes = np.full(world, (count - 1) // world + 1)
    remainder = sizes.sum() - count
    if remainder > 0:
        sizes[-remainder:] -= 1
    ends = np.cumsum(sizes)
    layout = Layout("nanotron", dp=world, zero_stage=1)
    own = _Optimizers(None, None, layout, 0, 0, {})  # type: ignore[arg-type]  # not looked at
    assert [own._range(count, dp)[1] for dp in range(world)] == ends.tolist()


def test_stages_share_the_computation(tmp_path: Path) -> None:
    """A big vocabulary leaves the last stage fewer layers."""
    for vocab, wanted in ((8, [0, 0, 0, 1]), (4000, [0, 0, 0, 0])):
        ckpt = family("llama", layers=4, vocab=vocab, optimizer=False)
        reshard(ckpt, tmp_path / str(vocab), Layout("nanotron", pp=2))
        names = [str(p) for p in (tmp_path / str(vocab)).rglob("*qkv_proj*/*")]
        stage = {int(re.search(r"decoder/(\d+)/", n)[1]): int(re.search(r"pp-rank-(\d)", n)[1])
                 for n in names}  # fmt: skip
        assert [stage[i] for i in range(4)] == wanted


def test_a_tied_head_has_states_on_both_ends(tmp_path: Path) -> None:
    _, folder = written(tmp_path, "nanotron:pp=2", tied=True)
    assert not list(folder.rglob("*lm_head*"))
    for stage in (0, 1):
        state = load(folder / "optimizer" / f"optimizer_pp-{stage}-of-2_tp-0-of-1_exp-0-of-1.pt")
        assert EMBEDDING in state["names"].values()
    assert open_checkpoint(tmp_path / "out").tied


def test_the_vocabulary_is_padded_for_tp(tmp_path: Path) -> None:
    ckpt, folder = written(tmp_path, "nanotron:tp=2", vocab=41)
    config = json.loads((folder / "model_config.json").read_text())
    assert config["vocab_size"] == 42
    got = open_checkpoint(tmp_path / "out").weights[EMBEDDING].read()
    want = ckpt.weights["model.embed_tokens.weight"].read()
    assert got[:41].tobytes() == want.tobytes()
    assert not got[41:].astype(np.float32).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nanotron:tp=4", r"key/value heads.*nearest valid: tp=2"),
        ("nanotron:tp=3", "nearest valid: tp=2"),
        ("nanotron:pp=9", "nearest valid: pp="),
        ("nanotron:pp=2,pp_layers=1+2", "sum to 2"),
        ("nanotron:vpp=2", "vpp=2"),
        ("nanotron:zero_stage=3", "ZeRO-1"),
    ],
)
def test_impossible_layouts_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        reshard(family("llama"), tmp_path / "out", Layout.parse(text))
    assert not any(tmp_path.iterdir())


def test_unknown_parameters_are_refused(tmp_path: Path) -> None:
    ckpt = family("llama", optimizer=False)
    bias = ckpt.weights["model.norm.weight"]
    more = {**ckpt.weights, "model.layers.0.self_attn.o_proj.bias": bias}
    with pytest.raises(UnsupportedError, match=r"o_proj\.bias"):
        reshard(replace(ckpt, weights=more), tmp_path / "out", Layout("nanotron"))
