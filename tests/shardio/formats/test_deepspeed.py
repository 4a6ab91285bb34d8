"""Every DeepSpeed fixture against the ground truth of the live engine, bit for bit, and every way
of breaking a checkpoint that must be refused.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mconv.errors import FormatError, MconvError
from mconv.shardio.agreement import check_master_agreement
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.compare import check_replicas
from mconv.shardio.coverage import prove
from mconv.shardio.formats import deepspeed
from mconv.shardio.registry import open_checkpoint
from safetensors.numpy import load_file

STATES = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
PLAIN = [
    "z0_dp2_bf16",
    "z1_dp2_bf16",
    "z1_dp2_bf16_frozen",
    "z1_dp2_bf16opt",
    "z1_dp3_fp32_odd",
    "z1_dp4_tiny_group@0.14.4",
    "z2_dp2_bf16_legacyzip",
    "z2_dp2_fp16",
    "z2_dp3_bf16_align",
    "z2_dp3_bf16_rr_groups",
    "z2_dp4_bf16_tied",
    "z3_dp2_bf16",
    "z3_dp2_bf16_lora",
    "z3_dp3_bf16_odd_subgroups",
    "z3_dp4_mics2@0.16.9",
]
CUT = ["autotp2_dp2_z1_bf16", "moe_ep2_dp2_z2_bf16", "pp2_dp2_z1_bf16", "pp2_tp2_dp2_z1_meg"]


def wide(array: np.ndarray) -> np.ndarray:
    """Floats as float32; integers and bools as they are."""
    return array if array.dtype.kind in "iub" else array.astype(np.float32)


def truth_of(case: Path) -> dict[str, np.ndarray]:
    return load_file(case / "truth.safetensors")


@pytest.fixture
def base(fixtures_dir: Path) -> Path:
    return fixtures_dir / "deepspeed"


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies the tag folder of a case so that it may be broken."""

    def make(case: str, name: str = "global_step3") -> Path:
        target = tmp_path / case / name
        shutil.copytree(base / case / "ckpt" / "global_step3", target)
        return target

    return make


def check_optimizer(ckpt: Checkpoint, truth: dict[str, np.ndarray]) -> None:
    seen = {state: set() for state in STATES.values()}
    for key, want in truth.items():
        kind, name = key.split("/", 1)
        if kind in STATES:
            got = ckpt.optimizer[STATES[kind]][name]
            assert got.shape == want.shape, key
            assert np.array_equal(got.read(), want), key
            seen[STATES[kind]].add(name)
    for state, names in seen.items():
        assert set(ckpt.optimizer[state]) == names


@pytest.mark.parametrize("case", [*PLAIN, *CUT])
def test_equals_truth(base: Path, case: str) -> None:
    ckpt = open_checkpoint(base / case / "ckpt")
    truth = truth_of(base / case)
    assert ckpt.format == "deepspeed"
    assert ckpt.step == 3
    check_optimizer(ckpt, truth)
    expected = {k.split("/", 1)[1]: v for k, v in truth.items() if not k.startswith("exp_avg")}
    assert set(ckpt.weights) == set(expected)
    for name, want in expected.items():
        got = ckpt.weights[name]
        rounded = got.cast(np.dtype(np.float32)).read() if got.dtype.kind not in "iub" else None
        exact = got.read() if rounded is None else rounded
        if got.dtype == want.dtype or f"fp32/{name}" not in truth:
            assert np.array_equal(exact, wide(want)), name
        elif name not in ckpt.args.get("averaged", ()):
            assert np.array_equal(exact, wide(want.astype(got.dtype))), name
    assert ckpt.tied == json.loads((base / case / "truth.json").read_text()).get("shared", {})
    for tensors in (ckpt.weights, *ckpt.optimizer.values()):
        prove(tensors)


@pytest.mark.parametrize("case", [*PLAIN, *CUT])
@pytest.mark.parametrize("sample", [None, 2])
def test_masters_agree(base: Path, case: str, sample: int | None) -> None:
    assert check_master_agreement(open_checkpoint(base / case / "ckpt"), sample=sample) == []


@pytest.mark.parametrize(
    "case", ["autotp2_dp2_z1_bf16", "pp2_tp2_dp2_z1_meg", "z1_dp2_bf16", "z3_dp2_bf16"]
)
def test_universal_equals_truth(base: Path, case: str) -> None:
    ckpt = open_checkpoint(base / case / "universal")
    assert ckpt.format == "deepspeed-universal"
    assert ckpt.step == 3
    truth = truth_of(base / case)
    check_optimizer(ckpt, truth)
    assert set(ckpt.weights) == {k[5:] for k in truth if k.startswith("fp32/")}
    prove(ckpt.weights)


def test_universal_without_a_parameter(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "global_step3"
    shutil.copytree(base / "z3_dp2_bf16" / "universal" / "global_step3", folder)
    shutil.rmtree(folder / "zero" / "lm_head.weight")
    refuse(folder, "zero/lm_head.weight/fp32.pt")
    (folder / "zero" / "model.norm.weight" / "exp_avg.pt").unlink()
    refuse(folder, "missing")


@pytest.mark.parametrize("case", ["pp2_dp2_z1_bf16"])
def test_pipeline_gives_hf_names(base: Path, case: str) -> None:
    ckpt = open_checkpoint(base / case / "ckpt")
    layers = json.loads((base / case / "truth.json").read_text())["layer_to_hf"]
    names = ckpt.args["hf_names"]
    assert set(names) == set(ckpt.weights)
    for name, hf in names.items():
        layer, _, rest = name.partition(".")
        assert hf == f"{layers[layer]}.{rest}"


def test_meshes_are_described(base: Path) -> None:
    ckpt = open_checkpoint(base / "autotp2_dp2_z1_bf16" / "ckpt")
    assert ckpt.layout.sizes() == {"tp": 2, "dp": 2, "zero_stage": 1}
    assert str(ckpt.placements["model.layers.0.self_attn.o_proj.weight"]["tp"]) == "Shard(1)"
    assert str(ckpt.placements["model.layers.0.self_attn.q_proj.weight"]["tp"]) == "Shard(0)"
    assert str(ckpt.placements["model.norm.weight"]["tp"]) == "Replicate"
    assert len(ckpt.replicas["model.norm.weight"]) == 1
    check_replicas(ckpt.weights, ckpt.replicas)
    meg = open_checkpoint(base / "pp2_tp2_dp2_z1_meg" / "ckpt")
    assert meg.layout.sizes() == {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1}
    assert meg.weights["0.word_embeddings.weight"].shape == (147, 32)
    assert any("147" in w for w in meg.warnings)


def test_no_framework_is_imported(base: Path) -> None:
    code = (
        "import sys\nfrom mconv.shardio.registry import open_checkpoint\n"
        f"open_checkpoint({str(base / 'z3_dp2_bf16' / 'ckpt')!r})\n"
        "print([m for m in ('torch', 'deepspeed', 'megatron', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("where", ["", "global_step3", "rank"])
def test_found_from_neighbours(base: Path, where: str) -> None:
    root = base / "z2_dp2_fp16" / "ckpt"
    path = next((root / "global_step3").glob("*optim*")) if where == "rank" else root / where
    assert open_checkpoint(path).path == root / "global_step3"


# -- broken checkpoints ---------------------------------------------------------------------------


def swap(a: Path, b: Path) -> None:
    third = a.with_name("third")
    a.rename(third)
    b.rename(a)
    third.rename(b)


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(MconvError) as caught:
        open_checkpoint(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("case", [*PLAIN[1:], *CUT])
def test_missing_rank_is_named(copy: Callable[[str], Path], case: str) -> None:
    folder = copy(case)
    for victim in sorted(folder.glob("*zero_pp_rank_*")):
        data = victim.read_bytes()
        victim.unlink()
        refuse(folder, victim.name, "missing")
        victim.write_bytes(data)


@pytest.mark.parametrize("case", [*PLAIN, *CUT])
def test_cut_byte(copy: Callable[[str], Path], case: str) -> None:
    folder = copy(case)
    for victim in sorted(folder.iterdir())[:6]:
        data = victim.read_bytes()
        victim.write_bytes(data[:-1])
        refuse(folder, victim.name)
        victim.write_bytes(data)


@pytest.mark.parametrize("case", [*PLAIN[1:], *CUT])
def test_swapped_rank_files(copy: Callable[[str], Path], case: str) -> None:
    folder = copy(case)
    files = sorted(folder.glob("*zero_pp_rank_*optim*"))
    swap(files[0], files[1])
    refuse(folder, "swapped")


def test_every_rank_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("z1_dp4_tiny_group@0.14.4")
    gone = [p for p in folder.glob("*optim*") if "rank_0_" not in p.name]
    for p in gone:
        p.unlink()
    refuse(folder, "3 rank files", *(p.name for p in gone))


def test_unfinished_save(copy: Callable[[str], Path]) -> None:
    folder = copy("z2_dp2_fp16")
    victim = next(folder.glob("*rank_1*optim*"))
    victim.rename(victim.with_suffix(".pt.tmp"))
    refuse(folder, "missing", "unfinished", victim.name + ".tmp")


def test_stage3_without_optimizer(copy: Callable[[str], Path]) -> None:
    folder = copy("z3_dp2_bf16")
    for p in folder.glob("*optim*"):
        p.unlink()
    refuse(folder, "weights lie in the optimizer files")


def test_stage1_without_optimizer_gives_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("z1_dp2_bf16")
    for p in folder.glob("*optim*"):
        p.unlink()
    ckpt = open_checkpoint(folder)
    assert len(ckpt.weights) == 30
    assert not ckpt.optimizer
    assert any("weights only" in w for w in ckpt.warnings)


def test_stale_files_of_a_larger_world_are_ignored(copy: Callable[[str], Path]) -> None:
    folder = copy("z1_dp2_bf16")
    other = copy("z1_dp3_fp32_odd")
    shutil.copy(
        next(other.glob("*rank_2*optim*")),
        folder / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
    )
    ckpt = open_checkpoint(folder)
    assert any("stale" in w for w in ckpt.warnings)
    assert ckpt.layout.dp == 2


def test_mixed_world_sizes(copy: Callable[[str], Path]) -> None:
    folder = copy("z1_dp2_bf16opt")
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(copy("z2_dp4_bf16_tied") / name, folder / name)
    refuse(folder, name)


def test_two_saves_of_one_rank(copy: Callable[[str], Path]) -> None:
    folder = copy("z1_dp2_bf16")
    first = next(folder.glob("*rank_0*optim*"))
    shutil.copy(first, folder / first.name.removeprefix("bf16_"))
    refuse(folder, "both the same rank")


def test_foreign_rank_of_the_same_world(copy: Callable[[str], Path]) -> None:
    folder = copy("z2_dp2_bf16_legacyzip")
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(copy("z1_dp2_bf16opt") / name, folder / name)
    with pytest.raises(FormatError, match=r"mixed|another model"):
        open_checkpoint(folder)


def edit(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Rewrite a torch.save file, entry by entry, with correct checksums."""
    with zipfile.ZipFile(path) as old:
        entries = [(i.filename, change(i.filename, old.read(i))) for i in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries:
            new.writestr(name, data)


def next_step(path: Path) -> None:
    """Give a rank file the counters of step 4."""

    def change(name: str, data: bytes) -> bytes:
        if name.endswith("data.pkl"):
            return re.sub(
                rb"(global_steps(?:q.|r....))K\x03",
                lambda m: m[1] + b"K\x04",
                data,
                flags=re.DOTALL,
            )
        return struct.pack("<f", 4) if data == struct.pack("<f", 3) else data

    edit(path, change)


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        ("z1_dp2_bf16", "*rank_1_*optim*"),
        ("z3_dp2_bf16", "*rank_1_*optim*"),
        ("z3_dp2_bf16", "*rank_1_*model*"),
        ("pp2_dp2_z1_bf16", "mp_rank_01_model*"),
        ("pp2_tp2_dp2_z1_meg", "*rank_1_mp_rank_03_optim*"),
    ],
)
def test_mixed_steps(copy: Callable[[str], Path], case: str, pattern: str) -> None:
    folder = copy(case)
    victim = next(folder.glob(pattern))
    next_step(victim)
    refuse(folder, victim.name, "step 4", "mixed")


def test_optimizer_of_another_step_is_noticed(copy: Callable[[str], Path]) -> None:
    folder = copy("z1_dp2_bf16")
    next_step(folder / "mp_rank_00_model_states.pt")
    assert any("step 3, the model at 4" in w for w in open_checkpoint(folder).warnings)


def test_disagreement_is_found_by_a_few_rows(copy: Callable[[str], Path]) -> None:
    """Two partitions exchanged inside files that are otherwise in order: only values tell."""
    folder = copy("z2_dp2_fp16")
    first, second = sorted(folder.glob("*optim*"))
    with zipfile.ZipFile(first) as a, zipfile.ZipFile(second) as b:
        big = [
            {i.filename.split("/", 1)[1]: f.read(i) for i in f.infolist() if i.file_size > 10_000}
            for f in (a, b)
        ]
    edit(first, lambda n, d: big[1].get(n.split("/", 1)[1], d))
    edit(second, lambda n, d: big[0].get(n.split("/", 1)[1], d))
    flaws = check_master_agreement(open_checkpoint(folder), sample=2)
    assert len(flaws) > 20
    assert "rounded to float16" in flaws[0].problem


def test_save_that_latest_names_is_gone(copy: Callable[[str], Path]) -> None:
    folder = copy("z2_dp2_fp16")
    (folder.parent / "latest").write_text("global_step9")
    ckpt = open_checkpoint(folder.parent)
    assert ckpt.path == folder
    assert any("names global_step9" in w for w in ckpt.warnings)


def test_trainer_folder_prefers_the_training_state(copy: Callable[[str], Path]) -> None:
    folder = copy("z3_dp2_bf16", "global_step3").parent
    (folder / "latest").write_text("global_step3")
    (folder / "rng_state_0.pth").write_bytes((folder / "latest").read_bytes())
    assert open_checkpoint(folder).format == "deepspeed"


def test_foreign_latest_is_no_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("../elsewhere")
    assert deepspeed.FORMAT.detect(tmp_path) is None


def test_empty_file(copy: Callable[[str], Path]) -> None:
    folder = copy("z3_dp2_bf16")
    victim = next(folder.glob("*rank_1*model*"))
    victim.write_bytes(b"")
    refuse(folder, victim.name, "empty")
