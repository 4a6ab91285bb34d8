"""ZeRO-3 states that were kept on NVMe: fixtures whose flat vectors are moved into swap files as
DeepSpeed lays them out, against the ground truth of the live engine.

``tests/e2e/test_nvme.py`` does the same with files that DeepSpeed's own swapper wrote.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mconv.errors import FormatError, MconvError, UnsupportedError
from mconv.shardio.coverage import prove
from mconv.shardio.registry import open_checkpoint
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")

CASE = "z3_dp3_bf16_odd_subgroups"
STATES = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
Make = Callable[..., Path]


def swap_out(folder: Path, *, keep: int = 0, first_id: int = 0, threads: int = 1) -> list[str]:
    """Move the vectors of all sub-groups but the ``keep`` smallest into swap files."""
    names = []
    for rank, path in enumerate(sorted(folder.glob("*optim_states.pt"))):
        model_path = next(folder.glob(f"zero_pp_rank_{rank}_*model_states.pt"))
        model = torch.load(model_path, weights_only=False)
        own = [n for n in model["module"] if n not in model["buffer_names"]]
        if threads > 1:
            model["ds_config"]["aio"] = {"intra_op_parallelism": threads}
            torch.save(model, model_path)
        saved = torch.load(path, weights_only=False)
        state = saved["optimizer_state_dict"]
        flats = state["fp32_flat_groups"]
        order = sorted(range(len(flats)), key=lambda k: flats[k].numel())
        out = folder / "offloaded_tensors" / f"rank{rank:02d}"
        out.mkdir(parents=True)
        for k in order[keep:]:
            table = list(model["param_shapes"][k])
            ids = "_".join(str(own.index(table[i]) + first_id) for i in (0, -1))
            write(out / f"{ids}.tensor.swp", flats[k], threads)
            flats[k] = torch.Tensor()
            moments = state["optimizer_state_dict"]["state"][k]
            for name in ("exp_avg", "exp_avg_sq"):
                write(out / f"{name}-{ids}.tensor.swp", moments[name], threads)
                moments[name] = torch.Tensor()
            names.append(ids)
        torch.save(saved, path)
    return names


def write(path: Path, values: torch.Tensor, threads: int) -> None:
    """A whole number of blocks; what is behind the values is never read."""
    data = values.detach().numpy().tobytes()
    path.write_bytes(data + b"\xff" * (-len(data) % (1024 * threads)))


@pytest.fixture
def make(fixtures_dir: Path, tmp_path: Path) -> Make:
    """A tag folder with swapped states."""

    def build(**options: int) -> Path:
        folder = tmp_path / "global_step3"
        shutil.copytree(fixtures_dir / "deepspeed" / CASE / "ckpt" / "global_step3", folder)
        assert swap_out(folder, **options)
        return folder

    return build


def check(folder: Path, case: Path) -> None:
    ckpt = open_checkpoint(folder)
    truth = load_file(case / "truth.safetensors")
    for key, want in truth.items():
        kind, name = key.split("/", 1)
        if kind in STATES:
            assert np.array_equal(ckpt.optimizer[STATES[kind]][name].read(), want), key
    assert {f"fp32/{n}" for n in ckpt.optimizer["master"]} == {
        k for k in truth if k.startswith("fp32/")
    }
    for tensors in (ckpt.weights, *ckpt.optimizer.values()):
        prove(tensors)


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 2}, {"threads": 4}, {"first_id": 17}],
    ids=["all", "small ones in memory", "four threads", "ids of a second model"],
)
def test_equals_truth(make: Make, fixtures_dir: Path, options: dict[str, int]) -> None:
    check(make(**options), fixtures_dir / "deepspeed" / CASE)


def test_files_of_an_earlier_run_are_ignored(make: Make, fixtures_dir: Path) -> None:
    folder = make()
    for rank in (folder / "offloaded_tensors").iterdir():
        (rank / "0_3.tensor.swp").write_bytes(bytes(1024))
        (rank / "exp_avg-0_3.tensor.swp").write_bytes(bytes(1024))
        (rank / "5_gradient_0_256.tensor.swp").write_bytes(bytes(1024))
    check(folder, fixtures_dir / "deepspeed" / CASE)


def test_absent_folder_says_where_it_was(make: Make) -> None:
    folder = make()
    for path in folder.glob("*model_states.pt"):
        model = torch.load(path, weights_only=False)
        offload = {"device": "nvme", "nvme_path": "/scratch/swap"}
        model["ds_config"]["zero_optimization"]["offload_optimizer"] = offload
        torch.save(model, path)
    shutil.rmtree(folder / "offloaded_tensors" / "rank01")
    with pytest.raises(UnsupportedError) as e:
        open_checkpoint(folder)
    assert "kept on NVMe" in str(e.value)
    assert "offloaded_tensors/rank01" in str(e.value)
    assert "/scratch/swap/zero_stage_3/optimizer/rank1:" in str(e.value)


@pytest.mark.parametrize("name", ["{ids}.tensor.swp", "exp_avg_sq-{ids}.tensor.swp"])
@pytest.mark.parametrize("rank", [0, 2])
def test_missing_and_short_files(make: Make, name: str, rank: int) -> None:
    folder = make()
    some = sorted((folder / "offloaded_tensors/rank00").glob("[0-9]*.tensor.swp"))[1]
    path = folder / f"offloaded_tensors/rank{rank:02d}" / name.format(ids=some.name.split(".")[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1024])
    with pytest.raises(MconvError, match=r"expected|cut off"):
        open_checkpoint(folder)
    path.unlink()
    with pytest.raises(FormatError, match=r"rank0"):
        open_checkpoint(folder)


def test_files_of_two_models_are_not_guessed(make: Make) -> None:
    folder = make()
    for rank in (folder / "offloaded_tensors").iterdir():
        for path in list(rank.glob("*.swp")):
            state, _, ids = path.name.removesuffix(".tensor.swp").rpartition("-")
            a, b = (int(n) + 40 for n in ids.split("_"))
            shutil.copy(path, rank / f"{state}{'-' * bool(state)}{a}_{b}.tensor.swp")
    with pytest.raises(FormatError, match="2 models of the same kind"):
        open_checkpoint(folder)


def test_bfloat16_masters(make: Make, fixtures_dir: Path) -> None:
    """Runs with bf16_master_weights_and_grads swap bfloat16 files."""
    folder = make()
    for path in folder.glob("*model_states.pt"):
        model = torch.load(path, weights_only=False)
        model["ds_config"]["bf16"]["bf16_master_weights_and_grads"] = True
        torch.save(model, path)
    for path in folder.glob("offloaded_tensors/*/*.swp"):
        count = path.stat().st_size // 4
        values = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)[:count]
        data = values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        path.write_bytes(data)
    with pytest.raises(FormatError, match="cannot tell"):  # 1024 blocks of floats were halved
        open_checkpoint(folder)
    for path in folder.glob("offloaded_tensors/*/*.swp"):
        path.write_bytes(path.read_bytes() + bytes(-path.stat().st_size % 1024))
    ckpt = open_checkpoint(folder)
    truth = load_file(fixtures_dir / "deepspeed" / CASE / "truth.safetensors")
    for name, tensor in ckpt.optimizer["master"].items():
        want = torch.from_numpy(truth[f"fp32/{name}"]).to(torch.bfloat16).float().numpy()
        assert np.array_equal(tensor.cast(np.dtype(np.float32)).read(), want), name
