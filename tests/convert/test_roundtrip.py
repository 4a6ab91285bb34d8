"""Chains of conversions on the real frameworks' checkpoints, and what the command says of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from mconv import Layout, open_checkpoint, reshard, roundtrip
from mconv.commands.reshard import command as reshard_command
from mconv.commands.roundtrip import command
from mconv.convert import roundtrip as module
from mconv.errors import ConfigError, LayoutError
from mconv.shardio.training_state import optimizer_step, training_state
from mconv.shardio.writers import writers

from ..shardio.writers.families import family

VIA = ["deepspeed:zero=1,dp=3", "torch", "deepspeed:zero=3,dp=4", "hf", "deepspeed-universal",
       "dcp:dp=3,tp=2", "hf-dcp:dp=2"]  # fmt: skip
CASES = {
    "deepspeed/z1_dp3_fp32_odd": None,
    "deepspeed/z2_dp3_bf16_rr_groups": None,
    "deepspeed/z2_dp4_bf16_tied": None,
    "deepspeed/z3_dp3_bf16_odd_subgroups": None,
    "deepspeed/z1_dp2_bf16_frozen": None,
    "torch/dcp_fsdp2_tp_2x2": None,
    "torch/ddp_torchsave_2r": None,
    "megatron/opt_dist_tp2dp2": 317,
}


def path_of(fixtures: Path, case: str) -> Path:
    folder = fixtures / case
    return folder / "ckpt" if (folder / "ckpt").exists() else folder / "torch"


@pytest.mark.parametrize("case", CASES)
def test_chains_lose_nothing(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    report = roundtrip(path_of(fixtures_dir, case), VIA, work=tmp_path, vocab_size=CASES[case])
    assert report.lossless, (report.missing, report.extra, report.changed)
    assert report.tensors > 30
    assert not any("step" in note and "now" in note for note in report.notes)
    assert not any(tmp_path.iterdir())


def test_groups_steps_and_schedules_come_through(fixtures_dir: Path, tmp_path: Path) -> None:
    source = path_of(fixtures_dir, "deepspeed/z2_dp3_bf16_rr_groups")
    place: Path = source
    for k, text in enumerate([*VIA, "deepspeed:zero=2,dp=2"]):
        reshard(place, tmp_path / str(k), Layout.parse(text), with_optimizer=True)
        place = tmp_path / str(k)
    before, after = open_checkpoint(source), open_checkpoint(place)
    assert optimizer_step(after) == optimizer_step(before) == 3
    a, b = training_state(before).groups, training_state(after).groups
    assert [{*g.names} for g in a] == [{*g.names} for g in b]
    assert [g.settings["weight_decay"] for g in b] == [0.1, 0.0]
    assert after.scalars["lr_scheduler"] == before.scalars["lr_scheduler"]


def test_a_loss_is_found(
    fixtures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One flipped bit on the way shows."""
    real = module.reshard

    def careless(src, dst, layout, **options):
        report = real(src, dst, layout, **options)
        file = Path(dst) / "pytorch_model.bin"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        return report

    monkeypatch.setattr(module, "reshard", careless)
    source = path_of(fixtures_dir, "torch/ddp_torchsave_2r")
    report = roundtrip(source, ["torch"], work=tmp_path, weights_only=True)
    assert not report.lossless
    assert len(report.changed) == 1


def test_bad_requests_are_refused_before_anything_is_written(
    fixtures_dir: Path, tmp_path: Path
) -> None:
    source = path_of(fixtures_dir, "torch/ddp_torchsave_2r")
    for via, error in (
        ([], ConfigError), (["depspeed:dp=2"], ConfigError), (["dcp:dq=2"], ConfigError),
        (["dcp:dp=x"], ConfigError), (["dcp:dtype=bf16"], ConfigError), (["dcp:dp=0"], LayoutError),
    ):  # fmt: skip
        with pytest.raises(error):
            roundtrip(source, via, work=tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_command(fixtures_dir: Path, tmp_path: Path) -> None:
    source = path_of(fixtures_dir, "deepspeed/z3_dp2_bf16")
    args = [str(source), "--via", "dcp:dp=2", "--via", "deepspeed:zero=2,dp=3"]
    done = CliRunner().invoke(command, [*args, "--work", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "lossless: deepspeed dp=2 zero_stage=3 > dcp dp=2 > deepspeed dp=3 zero_stage=2" in (
        done.output
    )
    done = CliRunner().invoke(command, [*args, "--json"])
    assert json.loads(done.stdout)["lossless"] is True


def test_reshard_takes_the_optimizer_where_one_trains_on(
    fixtures_dir: Path, tmp_path: Path
) -> None:
    source = str(path_of(fixtures_dir, "deepspeed/z3_dp2_bf16"))
    run = CliRunner().invoke
    for k, (options, states) in enumerate(
        (
            (["--to", "deepspeed", "--zero-stage", "1", "--dp", "3"], True),
            (["--to", "dcp", "--dp", "2", "--tp", "2"], True),
            (["--to", "dcp", "--dp", "2", "--weights-only"], False),
            (["--to", "hf"], False),
            (["--to", "hf", "--with-optimizer"], True),
        )
    ):
        done = run(reshard_command, [source, str(tmp_path / str(k)), *options])
        assert done.exit_code == 0, done.output
        assert bool(open_checkpoint(tmp_path / str(k)).optimizer) == states
    note = json.loads((tmp_path / "0" / "mconv.json").read_text())
    assert note["layout"] == "deepspeed dp=3 zero_stage=1"
    assert any("rng" in text for text in note["not_carried"])


def test_a_cast_keeps_the_full_weights_as_masters(fixtures_dir: Path, tmp_path: Path) -> None:
    source = path_of(fixtures_dir, "torch/dcp_fsdp2_2r")
    reshard(source, tmp_path / "out", Layout.parse("deepspeed:zero=2,dp=2,dtype=bf16"))
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert str(after.weights[name].dtype) == "bfloat16"
    master = after.optimizer["master"][name].read()
    assert master.tobytes() == before.weights[name].read().tobytes()


@pytest.mark.parametrize("target", sorted(writers()))
def test_every_target_tells_where_it_comes_from(tmp_path: Path, target: str) -> None:
    """Source, layout, hashes, and what was not carried: in the file and in the report."""
    meta = target == "meta"
    source = tmp_path / "source"
    reshard(family("llama"), source, Layout("hf"), with_optimizer=not meta)
    layout = Layout(target, zero_stage=1 if target.startswith("deepspeed-p") else 0)
    report = reshard(source, tmp_path / "out", layout)
    note = json.loads((tmp_path / "out" / "mconv.json").read_text())
    assert note["source"]["path"] == str(source)
    assert note["source"]["format"] == "hf"
    stamps = note["source"]["files"]
    assert stamps
    assert all(s["bytes"] == (source / n).stat().st_size for n, s in stamps.items())
    assert note["layout"] == layout.describe()
    assert set(note["files"]) == set(report.files) - {"mconv.json"}
    assert [*note["notes"], *note["not_carried"]] == list(report.warnings)
    for name in (n for n in note["files"] if n.endswith((".json", "latest"))):
        data = (tmp_path / "out" / name).read_bytes()
        assert note["sha256"][name] == hashlib.sha256(data).hexdigest(), name
    assert len(note["plan"]) == 64
    assert set(note["plan"]) != {"0"}


def test_other_stages_are_another_plan(fixtures_dir: Path, tmp_path: Path) -> None:
    """So that an interrupted run is not continued with them."""
    found = set()
    for text in ("2+4", "4+2"):
        layout = Layout.parse(f"deepspeed:pp=2,zero=1,pp_layers={text}")
        reshard(path_of(fixtures_dir, "deepspeed/pp2_dp2_z1_bf16"), tmp_path / text, layout)
        note = json.loads((tmp_path / text / "mconv.json").read_text())
        assert note["options"]["pp_layers"] == [int(n) for n in text.split("+")]
        found.add(note["plan"])
    assert len(found) == 2
