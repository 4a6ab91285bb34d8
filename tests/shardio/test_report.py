"""What ``mconv inspect`` tells of each format, and its tree, tensor and check views."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.errors import ConfigError
from mconv.shardio import open_checkpoint
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.chunked import Chunked
from mconv.shardio.dtypes import BFLOAT16
from mconv.shardio.module_tree import Module, module_tree
from mconv.shardio.report import inspect_checkpoint, present_files
from mconv.shardio.source import FileSource
from mconv.shardio.tensor import LazyTensor, from_array
from mconv.shardio.tensor_detail import tensor_detail
from mconv.shardio.tensor_stats import tensor_stats


def run(*args: object) -> str:
    result = CliRunner().invoke(cli, ["inspect", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


# ---------------------------------------------------------------- the report

MESHES = {
    "deepspeed/pp2_tp2_dp2_z1_meg/ckpt": {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1},
    "deepspeed/z3_dp2_bf16/ckpt": {"dp": 2, "zero_stage": 3},
    "deepspeed/moe_ep2_dp2_z2_bf16/ckpt": {"ep": 2, "dp": 2, "zero_stage": 2},
    "megatron/qwen3moe_tp2ep2pp2/torch": {"tp": 2, "pp": 2, "ep": 2},
    "megatron/llama_tp2pp2_vpp2/torch": {"tp": 2, "pp": 2, "vpp": 2},
    "megatron/opt_dist_tp2dp2/torch_dist": {"tp": 2, "dp": 2},
    "torch/dcp_fsdp2_tp_2x2/ckpt": {"tp": 2, "dp": 2},
    "torch/meta_consolidated_tp2/ckpt": {"tp": 2},
    "nanotron/nanotron_tp2_pp2/ckpt": {"tp": 2, "pp": 2},
    "colossalai/colossalai_pp2/ckpt": {"pp": 2},
}


@pytest.mark.parametrize("case", MESHES)
def test_the_mesh_and_every_cut_are_told(fixtures_dir: Path, case: str) -> None:
    report = inspect_checkpoint(open_checkpoint(fixtures_dir / case))
    assert report.layout == MESHES[case]
    assert report.coverage == 1.0
    assert report.whole
    if report.layout.get("tp", 1) > 1:
        assert any("Shard" in t.placement or "Fused" in t.placement for t in report.tensors)


def test_rank_files_are_listed(fixtures_dir: Path) -> None:
    report = inspect_checkpoint(open_checkpoint(fixtures_dir / "deepspeed/z2_dp4_bf16_tied/ckpt"))
    names = [f.name for f in report.rank_files]
    assert len(names) == 5
    assert report.files == 1  # the weights are in one of them
    assert all(f.weights or f.states for f in report.rank_files)
    assert report.optimizer_kind == "AdamW with fp32 masters"
    assert dict(report.tied) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_padded_vocabulary(fixtures_dir: Path, tmp_path: Path) -> None:
    case = fixtures_dir / "megatron/llama_tp2pp2"
    config = case / "config.json"
    text = run(case / "torch", *(("--config", config) if config.exists() else ()))
    assert "has 512 rows, 317 are real" in text
    shutil.copytree(case / "torch", tmp_path / "ckpt")
    for path in tmp_path.rglob("config.json"):
        path.unlink()
    report = inspect_checkpoint(open_checkpoint(tmp_path / "ckpt"))
    assert {v[0] for v in report.padded.values()} == {512}


def test_frozen_weights_and_kinds_of_optimizers(fixtures_dir: Path) -> None:
    frozen = open_checkpoint(fixtures_dir / "deepspeed/z1_dp2_bf16_frozen/ckpt")
    report = inspect_checkpoint(frozen)
    assert len(report.frozen) == 10
    w = {"w": from_array(np.ones(3, np.float32))}
    for states, kind in (
        (("exp_avg", "exp_avg_sq"), "Adam"),
        (("exp_avg",), "Lion"),
        (("momentum_buffer", "master"), "SGD or Muon with momentum with fp32 masters"),
        (("strange",), "unknown"),
    ):
        ckpt = Checkpoint(
            path=Path("x"), format="hf", weights=w, optimizer=dict.fromkeys(states, w)
        )
        assert inspect_checkpoint(ckpt).optimizer_kind == kind
    named = Checkpoint(
        path=Path("x"), format="d", weights=w, optimizer={"exp_avg": w},
        args={"ds_config": {"optimizer": {"type": "Lion"}}},
    )  # fmt: skip
    assert inspect_checkpoint(named).optimizer_kind == "Lion"


def test_broken_checkpoints_say_how_much_is_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(400))
    source = FileSource.of(path)
    chunks = Chunked.contiguous(source, 0, (50,), np.dtype("f4")).chunks
    ckpt = Checkpoint(
        path=tmp_path,
        format="x",
        weights={
            "w": Chunked((100,), np.dtype("f4"), chunks),
            "v": Chunked.contiguous(source, 0, (100,), np.dtype("f4")),
        },
    )
    report = inspect_checkpoint(ckpt)
    assert not report.whole
    assert report.coverage == 0.75


def test_commands_say_what_they_need(fixtures_dir: Path) -> None:
    report = inspect_checkpoint(open_checkpoint(fixtures_dir / "torch/dcp_fsdp2_2r/ckpt"))
    assert report.commands[0].startswith("mconv reshard ")
    assert "--tokenizer MODEL_FOLDER" in report.commands[1]
    assert "MODEL_FOLDER: the folder of its config.json" in run(report.path)
    frozen = open_checkpoint(fixtures_dir / "deepspeed/z3_dp2_bf16_lora/ckpt")
    assert [c.split()[1] for c in inspect_checkpoint(frozen).commands] == ["reshard"]


CONVERTED = (
    "colossalai/colossalai_pp2/ckpt", "deepspeed/pp2_dp2_z1_bf16/ckpt", "torch/dcp_zstd_2r/ckpt",
    "deepspeed/z3_dp3_bf16_odd_subgroups/ckpt", "megatron/llama_tied_tp2pp2/torch",
    "megatron/mixtral_tp2ep2_etp1/torch_dist", "nanotron/nanotron_tp2_pp2/ckpt",
    "torch/fairscale_flat_2r/ckpt", "torch/meta_consolidated_tp2/ckpt", "tf/tf2_object/ckpt",
)  # fmt: skip


@pytest.mark.parametrize("fixture", CONVERTED)
def test_the_command_converts_it(
    fixtures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixture: str
) -> None:
    """As it stands; in a folder where MODEL_FOLDER is what the command says it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL_FOLDER").mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    (tmp_path / "MODEL_FOLDER" / "config.json").write_text(json.dumps(config))
    command = inspect_checkpoint(open_checkpoint(fixtures_dir / fixture)).commands[0]
    program, *args = shlex.split(command)
    result = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert program == "mconv" and result.exit_code == 0, result.output
    assert open_checkpoint(tmp_path / "OUT").format == "hf"


def test_missing_rank_files_are_named_beside_those_that_are_there(
    fixtures_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(fixtures_dir / "deepspeed/z2_dp4_bf16_tied/ckpt", tmp_path / "ckpt")
    lost = min(Path(folder).glob("*/*rank_1_*optim_states.pt"))
    lost.unlink()
    result = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert result.exit_code != 0
    assert lost.name in str(result.exception)
    assert "3 files" in result.stderr
    assert sum(n for n, _ in present_files(folder).values()) == 6


# ---------------------------------------------------------------- --tree


def test_the_tree_sums_up_equal_layers(fixtures_dir: Path) -> None:
    report = inspect_checkpoint(open_checkpoint(fixtures_dir / "megatron/mixtral_ep2/torch"))
    root = module_tree(report.tensors, "m")
    assert root.parameters == report.parameters
    assert root.nbytes == report.nbytes

    def count(module: Module) -> int:
        own = 1 if module.tensor else 0
        return module.count * (own + sum(map(count, module.children)))

    assert count(root) == len(report.tensors)
    text = run(fixtures_dir / "megatron/mixtral_ep2/torch", "--tree")
    assert "0..3 x 4" in text
    assert len(text.splitlines()) < len(report.tensors)
    data = json.loads(run(fixtures_dir / "megatron/mixtral_ep2/torch", "--tree", "--json"))
    assert data["parameters"] == report.parameters


def test_unequal_neighbours_stay_apart() -> None:
    def line(name: str, rows: int) -> tuple[str, LazyTensor]:
        return name, from_array(np.zeros((rows, 2), np.float32))

    rows = {0: 4, 1: 4, 2: 6, 3: 4, 4: 4, 6: 4}
    weights = dict(line(f"l.{k}.w", n) for k, n in rows.items())
    weights["a.." + "b." * 5000] = from_array(np.zeros(1, np.float32))
    report = inspect_checkpoint(Checkpoint(path=Path("x"), format="hf", weights=weights))
    root = module_tree(report.tensors)
    assert [c.name for c in root.children[0].children] == ["0..1", "2", "3..4", "6"]
    assert root.parameters == report.parameters


# ---------------------------------------------------------------- --tensor


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16, np.int32, np.bool_])
def test_statistics_are_numpys(dtype: object) -> None:
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((1500, 1100)) * 9).astype(dtype)  # type: ignore[call-overload]
    stats = tensor_stats(from_array(values))
    wide = values.astype(np.float64)
    assert (stats.min, stats.max) == (wide.min(), wide.max())
    assert stats.mean == pytest.approx(wide.mean(), rel=1e-9)
    assert stats.std == pytest.approx(wide.std(), rel=1e-9)
    assert stats.zeros == np.count_nonzero(wide == 0)
    assert stats.histogram is not None
    h = stats.histogram
    assert sum(h.counts) + h.below + h.above == values.size
    assert len(h.edges) == len(h.counts) + 1


def test_statistics_of_odd_tensors() -> None:
    bad = np.array([np.nan, np.inf, -np.inf, 2, 2], np.float32)
    stats = tensor_stats(from_array(bad))
    assert (stats.nan, stats.inf, stats.min, stats.max, stats.std) == (1, 2, 2, 2, 0)
    assert stats.histogram is not None
    assert sum(stats.histogram.counts) == 2
    assert tensor_stats(from_array(np.zeros((0, 4), np.float32))).mean is None
    assert tensor_stats(from_array(np.full(3, np.nan, np.float32))).mean is None
    huge = np.array([-3e38, 3e38], np.float32)
    assert tensor_stats(from_array(huge)).max == np.float32(3e38)


def test_pieces_are_where_the_bytes_are(fixtures_dir: Path) -> None:
    ckpt = open_checkpoint(fixtures_dir / "torch/dcp_fsdp2_tp_2x2/ckpt")
    name = "model.layers.0.mlp.down_proj.weight"
    detail = tensor_detail(ckpt, name)
    whole = ckpt.weights[name].read()
    assert len(detail.pieces) == 4
    for piece in detail.pieces:
        assert piece.contiguous
        assert piece.start is not None
        assert piece.shape is not None
        with piece.path.open("rb") as f:
            f.seek(piece.offset)
            found = np.frombuffer(f.read(piece.nbytes), whole.dtype).reshape(piece.shape)
        box = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
        assert np.array_equal(found, whole[box])
    assert detail.states == ("exp_avg", "exp_avg_sq")
    assert tensor_detail(ckpt, f"exp_avg.{name}").shape == detail.shape


def test_tied_names_and_wrong_names(fixtures_dir: Path) -> None:
    ckpt = open_checkpoint(fixtures_dir / "deepspeed/z2_dp4_bf16_tied/ckpt")
    detail = tensor_detail(ckpt, "lm_head.weight")
    assert (detail.name, detail.alias) == ("model.embed_tokens.weight", "lm_head.weight")
    with pytest.raises(ConfigError, match=r"did you mean 'model\.norm\.weight'"):
        tensor_detail(ckpt, "model.norm.weigt")


def test_all_views_as_text_and_json(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "deepspeed/z2_dp4_bf16_tied/ckpt"
    assert "AdamW with fp32 masters" in run(folder)
    shown = run(folder, "--tensor", "lm_head.weight")
    assert "tied to it" in shown
    assert "█" in shown
    data = json.loads(run(folder, "--tensor", "model.norm.weight", "--json"))
    assert data["shape"] == [32]
    assert data["stats"]["nan"] == 0
    assert "sound" in run(folder, "--verify")
    data = json.loads(run(folder, "--verify", "--json"))
    assert data["sound"] is True
    assert data["checked"]["masters"] > 0
    assert run(folder, "--verify", "--quiet") == ""
    both = CliRunner().invoke(cli, ["inspect", str(folder), "--verify", "--tree"])
    assert both.exit_code == 2


def test_json_has_no_nan(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + np.array([np.nan], "<f4").tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    text = run(tmp_path, "--tensor", "w", "--json")
    assert json.loads(text, parse_constant=pytest.fail)["stats"]["nan"] == 1
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path), "--verify"])
    assert result.exit_code == 2
    assert "w: 1 NaN values" in result.stderr


def test_buffers_are_not_frozen_and_every_tensor_has_a_place(fixtures_dir: Path) -> None:
    odd = open_checkpoint(fixtures_dir / "deepspeed/z1_dp3_fp32_odd/ckpt")
    assert inspect_checkpoint(odd).frozen == ()
    text = run(fixtures_dir / "deepspeed/pp2_dp2_z1_bf16/ckpt", "--tensors")
    assert "layer_01-model_states.pt" in text
    assert "bf16_zero_pp_rank_*_mp_rank_*_optim_states.pt  4 files (0..1 x 0..1)" in text
