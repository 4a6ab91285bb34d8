"""Malicious content in the place of a file of every format that holds pickles or archives.

Each is opened, inspected, fully checked and planned: never executed, refused or read as inert data
within 10 s of CPU time and 1 GB of memory, nothing written. See also the fuzzer.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from fuzz import cpu_limit, examine
from fuzz_cases import Case
from harness import TRAINED, copy, mconv

_SECONDS, _MEMORY = 10.0, 1 << 30


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def commands(canary: Path) -> dict[str, bytes]:
    """Programs that run code in a careless loader."""
    touch = text(f"touch {canary}")
    getattr_ = glob("builtins", "getattr")
    os_ = call(glob("importlib", "import_module"), text("os"))
    chain = call(call(getattr_, os_, text("system")), touch)
    deep = call(
        getattr_,
        call(getattr_, glob("torch._utils", "_rebuild_tensor_v2"), text("__globals__")),
        text("get"),
    )
    code = text(f"__import__('os').system('touch {canary}')")
    return {
        "os.system": call(glob("os", "system"), touch),
        "posix.system": call(glob("posix", "system"), touch),
        "eval": call(glob("builtins", "eval"), code),
        "exec": call(glob("builtins", "exec"), code),
        "subprocess": call(glob("subprocess", "check_output"), b"]" + touch + b"a"),
        "getattr chain": chain,
        "globals of a known function": call(call(deep, text("os")), touch),
        "dotted name": b"\x8c\x08builtins\x8c\x0deval.__call__\x93" + b"(" + code + b"tR",
        "new object": glob("os", "system") + b"(" + touch + b"t\x81",
        "inst": b"(" + touch + b"ios\nsystem\n",
        "build": glob("a", "B") + b")\x81}" + text("__setstate__") + glob("os", "system") + b"sb"
        + touch + b"b",
        "reduce in a tensor": call(glob("torch._utils", "_rebuild_parameter"),
                                   call(glob("os", "system"), touch), b"\x88", b"N"),
        "loads in a tensor": call(glob("torch.storage", "_load_from_bytes"),
                                  b"C" + bytes([len(p := pickle.dumps(0))]) + p),
        "extension code 1": b"\x82\x01",
        "extension code 4": b"\x84\xff\xff\xff\x7f",
    }  # fmt: skip


BOMBS: dict[str, bytes] = {
    "doubling": b"K\x01" + b"2\x86" * 200,
    "memo doubling": b"]q\x00" + b"".join(b"(h\x00h\x00lq\x00" for _ in range(120)),
    "memo index": b"Nr\xff\xff\xff\xff",
    "long string": b"\x8d" + struct.pack("<Q", 2**62) + b"abc",
    "bytearray": call(glob("builtins", "bytearray"), b"\x8a\x05" + (10**11).to_bytes(5, "little")),
    "deep lists": b"]" * 200_000 + b"a" * 199_999,
    "marks": b"(" * 1_000_000,
    "sets": b"(" + b"\x8f" * 3_000_000 + b"t",
    "big integer": b"L" + b"9" * 200_000 + b"L\n",
    "list in itself": b"]q\x00h\x00a",
}


def archive(pickled: bytes, *, method: int = 0, name: str = "archive/data.pkl") -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", method) as f:
        f.writestr(name, pickled)
        f.writestr("archive/version", "3\n")
    return raw.getvalue()


def zip_bomb() -> bytes:
    """10 MB that unpack to 10 GB, as the tensor of a small pickle would."""
    squeezed = zlib.compress(bytes(100 << 20), 9)[2:-4]
    name = b"archive/data.pkl"
    size = 10 << 30
    head = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(squeezed), 0xFFFFFFFF,
                       len(name), 12) + name + struct.pack("<HHQ", 1, 8, size)  # fmt: skip
    wide = name + struct.pack("<HHQ", 1, 8, size)
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(squeezed),
                        0xFFFFFFFF, len(name), 12, 0, 0, 0, 0, 0) + wide  # fmt: skip
    at = len(head) + len(squeezed)
    return (
        head + squeezed + entry
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), at, 0)
    )  # fmt: skip


def many_entries() -> bytes:
    """A directory that names one entry a hundred thousand times."""
    good = archive(b"N.")
    at = good.rfind(b"PK\1\2", 0, good.rfind(b"PK\1\2"))
    entry = good[at : good.find(b"PK\1\2", at + 4)]
    body, count = good[: good.find(b"PK\1\2")], 60_000
    directory = entry * count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    return body + directory + end


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "compressed": lambda: archive(pickle.dumps({"a": bytes(10_000_000)}), method=8),
    "zip bomb": zip_bomb,
    "leaves its folder": lambda: archive(b"}.", name="../../data.pkl"),
    "absolute": lambda: archive(b"}.", name="/etc/data.pkl"),
    "the same entry": many_entries,
    "directory outside": lambda: struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 2**31, 2**31, 0),
    "zip64 lies": lambda: struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 2**62, 2**62)
    + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1) + archive(b"}."),
    "comment": lambda: archive(b"}.") + b"x" * 70_000,
}  # fmt: skip

TARGETS = {
    "torch/hf_bin_sharded/ckpt": "*.bin",
    "torch/ddp_torchsave_2r/ckpt": "*.pt",
    "torch/dcp_fsdp2_2r/ckpt": ".metadata",
    "torch/fairscale_flat_2r/ckpt": "*shard*",
    "torch/meta_consolidated_tp2/ckpt": "*.pth",
    "torch/dtensor_ranksave_2x2/ckpt": "*rank*",
    "deepspeed/z3_dp2_bf16/ckpt": "*/*model_states.pt",
    "deepspeed/z2_dp2_fp16/ckpt": "*/*optim_states.pt",
    "deepspeed/z1_dp2_bf16/universal": "*/zero/*/fp32.pt",
    "deepspeed/pp2_dp2_z1_bf16/ckpt": "*/layer_*",
    "megatron/llama_tp2pp2/torch": "*/*/model_optim_rng.pt",
    "megatron/opt_dist_tp2dp2/torch": "*/*/distrib_optim.pt",
    "megatron/llama_tp2pp2/torch_dist": "*/common.pt",
    "colossalai/colossalai_pp2/ckpt": "optimizer/*.bin",
}


def check(case: Case, work: Path, canary: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with cpu_limit(_SECONDS):
        assert examine(case.folder, case, work / "out") in ("read", "refused")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < _MEMORY
    assert not (work / "out").exists()
    assert not canary.exists()


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_files(fixtures_dir: Path, tmp_path: Path, target: str) -> None:
    canary = tmp_path / "canary"
    contents: list[bytes] = []
    turn = list(TARGETS).index(target)  # each target gets every program in one of three wrappings
    for k, program in enumerate((*commands(canary).values(), *BOMBS.values())):
        nested = b"\x80\x02}" + text("model") + program + b"s."
        bare = b"\x80\x02" + program + b"."
        contents.append((nested, archive(bare), archive(nested))[(k + turn) % 3])
    contents += [make() for make in ARCHIVES.values()]
    folder = copy(fixtures_dir / target, tmp_path / "src")
    victims = sorted(folder.glob(TARGETS[target]))
    assert victims
    config = fixtures_dir / target.partition("/ckpt")[0] / "config.json"
    case = Case(folder, config if config.exists() else None, 317 if "megatron" in target else None)
    for content in contents:
        victims[0].write_bytes(content)
        check(case, tmp_path, canary)


def test_the_programs_do_run_elsewhere(tmp_path: Path) -> None:
    """Otherwise they would prove nothing."""
    ran = 0
    for name, program in commands(tmp_path / "canary").items():
        try:
            pickle.loads(b"\x80\x04" + program + b".")
        except Exception:
            assert name not in ("os.system", "eval", "getattr chain")
        if (tmp_path / "canary").exists():
            ran += 1
            (tmp_path / "canary").unlink()
    assert ran >= 8


LINKS: dict[str, Callable[[Path], None]] = {
    "a link to itself": lambda p: p.symlink_to(p.name),
    "a link to its folder": lambda p: p.symlink_to("."),
    "a link to the folder above": lambda p: p.symlink_to(".."),
    "a dangling link": lambda p: p.symlink_to("nowhere"),
    "endless zeros": lambda p: p.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("target", [*TARGETS, "torch/hf_safetensors_sharded/ckpt"])
def test_links_in_circles(fixtures_dir: Path, tmp_path: Path, target: str, link: str) -> None:
    """In the place of a file, and beside the files under another name."""
    folder = copy(fixtures_dir / target, tmp_path / "src")
    LINKS[link](folder / "beside")
    check(Case(folder), tmp_path, tmp_path / "canary")
    victim = min(folder.glob(TARGETS.get(target, "*.safetensors")))
    victim.unlink()
    LINKS[link](victim)
    check(Case(folder), tmp_path, tmp_path / "canary")


def test_header_bombs(tmp_path: Path) -> None:
    """Headers of many tensors, of deep JSON, of a length that the file does not have."""
    deep = b'{"a":' * 200_000
    many = b"{" + b",".join(
        b'"%d":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}' % (k, b"0," * 200 + b"0")
        for k in range(20_000)
    ) + b"}"  # fmt: skip
    wide = b'{"a":{"dtype":"F32","shape":[' + b"1," * 3_000_000 + b'1],"data_offsets":[0,4]}}'
    for k, header in enumerate((deep, many, wide, b"{" + b" " * 20_000_000 + b"}")):
        for length in (len(header), 2**40):
            folder = tmp_path / f"{k}-{length}"
            folder.mkdir()
            data = struct.pack("<Q", length) + header + bytes(4)
            (folder / "model.safetensors").write_bytes(data)
            check(Case(folder), tmp_path, tmp_path / "canary")


def test_paths_that_leave_the_folder(tmp_path: Path) -> None:
    folder = copy(TRAINED / "hf", tmp_path / "src")
    (folder / "model.safetensors").rename(tmp_path / "stolen.safetensors")
    for where in ("../stolen.safetensors", str(tmp_path / "stolen.safetensors")):
        index = f'{{"weight_map": {{"model.norm.weight": "{where}"}}}}'
        (folder / "model.safetensors.index.json").write_text(index)
        said = mconv("inspect", folder)
        assert said.code == 2
        assert "stolen" in said.err
