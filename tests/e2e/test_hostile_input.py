"""Input that lies or attacks, through the command line: headers, indexes, paths, pickles, configs,
tokenizers, and things that are no checkpoint at all.

Nothing read is ever executed; every case ends in one clear error and leaves nothing behind.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import TRAINED, assert_refused, copy, mconv, process

HF = TRAINED / "hf"


def refused(source: Path, tmp_path: Path, *options: object, command: str = "reshard") -> str:
    """Run a command that must refuse its source."""
    work = tmp_path / "out"
    work.mkdir(exist_ok=True)
    target = work / ("m.gguf" if command == "to-gguf" else "hf")
    return assert_refused(mconv(command, source, target, *options), work)


# ---------------------------------------------------------------- safetensors headers


def tensor(first: int, end: int, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


def file_of(header: Any, data: int = 32, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


HONEST = {"a": tensor(0, 16), "b": tensor(16, 32)}
HEADERS: dict[str, bytes] = {
    "hole": file_of({"a": tensor(0, 16), "b": tensor(20, 36)}, 36),
    "hole at the end": file_of(HONEST, 40),
    "overlap": file_of({"a": tensor(0, 16), "b": tensor(8, 24)}, 24),
    "same place": file_of({"a": tensor(0, 16), "b": tensor(0, 16)}, 16),
    "beyond the file": file_of(HONEST, 31),
    "negative offset": file_of({"a": tensor(-16, 0)}, 16),
    "end before begin": file_of({"a": tensor(16, 0)}, 16),
    "NaN offset": file_of(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,NaN]}}', 16),
    "endless shape": file_of(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,16]}}', 16),
    "huge number": file_of({"a": tensor(0, 10**30)}, 16),
    "float offset": file_of({"a": tensor(0, 16.0)}, 16),  # type: ignore[arg-type]
    "true offset": file_of({"a": tensor(False, 16)}, 16),
    "text offset": file_of({"a": tensor("0", 16)}, 16),  # type: ignore[arg-type]
    "three offsets": file_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, 16),
    "shape of other size": file_of({"a": tensor(0, 16, (5,))}, 16),
    "overflowing shape": file_of({"a": tensor(0, 16, (2**32, 2**32, 0))}, 16),
    "negative shape": file_of({"a": tensor(0, 16, (-2, -2))}, 16),
    "shape is a number": file_of({"a": tensor(0, 16, 4)}, 16),
    "unknown dtype": file_of({"a": tensor(0, 16, (4,), "F33")}, 16),
    "dtype is null": file_of({"a": tensor(0, 16, (4,), None)}, 16),
    "no dtype": file_of({"a": {"shape": [4], "data_offsets": [0, 16]}}, 16),
    "entry is a list": file_of({"a": [1]}, 16),
    "duplicate names": file_of(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', 16),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}, **HONEST}),
    "not JSON": file_of(b"{'a': 1}"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "a list": file_of([1, 2]),
    "deeply nested": file_of(b'{"a":' * 100_000),
    "length 2**63": file_of(HONEST, length=2**63),
    "length 2**64 - 1": file_of(HONEST, length=2**64 - 1),
    "length of all": file_of(HONEST, length=10**6),
    "length 0": file_of(HONEST, length=0),
    "no header": b"",
    "seven bytes": b"\x10\0\0\0\0\0\0",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_lying_headers(tmp_path: Path, name: str) -> None:
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "model.safetensors"
    path.write_bytes(HEADERS[name])
    assert path.name in refused(tmp_path / "src", tmp_path)
    assert path.name in refused(path, tmp_path)
    assert mconv("inspect", path).code == 2


def test_the_honest_header_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(file_of(HONEST))
    assert mconv("reshard", tmp_path / "model.safetensors", tmp_path / "hf").code == 0


# ---------------------------------------------------------------- indexes and paths

PART = "model-00001-of-00006.safetensors"
INDEXES: dict[str, Callable[[dict[str, str]], Any]] = {
    "parent path": lambda m: {"weight_map": {**m, next(iter(m)): "../model.safetensors"}},
    "absolute path": lambda m: {"weight_map": {**m, next(iter(m)): "/etc/passwd"}},
    "itself": lambda m: {"weight_map": dict.fromkeys(m, "model.safetensors.index.json")},
    "other file": lambda m: {"weight_map": dict.fromkeys(m, PART)},
    "unknown tensor": lambda m: {"weight_map": {**m, "lm_head.scale": PART}},
    "lost file": lambda m: {"weight_map": {**m, "x": "model-00007-of-00007.safetensors"}},
    "numbers": lambda m: {"weight_map": dict.fromkeys(m, 1)},
    "no map": lambda m: {"metadata": {}},
    "map is a list": lambda m: {"weight_map": list(m)},
    "empty map": lambda m: {"weight_map": {}},
    "nul byte": lambda m: {"weight_map": {**m, next(iter(m)): "a\0b"}},
    "long name": lambda m: {"weight_map": {**m, next(iter(m)): "x" * 5000}},
    "null": lambda m: None,
}


@pytest.mark.parametrize("name", INDEXES)
def test_lying_indexes(fixtures_dir: Path, tmp_path: Path, name: str) -> None:
    folder = copy(fixtures_dir / "torch/hf_safetensors_sharded/ckpt", tmp_path / "src")
    shutil.copy(min(folder.glob("*.safetensors")), tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps(INDEXES[name](known)))
    assert "index" in refused(folder, tmp_path) or name == "lost file"


@pytest.mark.parametrize("text", ["../../etc", "/etc", "a\0b", "x" * 5000, "\n\n", "-1", "9" * 40])
@pytest.mark.parametrize("tracker", ["latest", "latest_checkpointed_iteration.txt"])
def test_trackers_lead_nowhere_else(tmp_path: Path, tracker: str, text: str) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / tracker).write_text(text)
    assert str(tmp_path / "src") in refused(tmp_path / "src", tmp_path)


def test_metadata_that_leaves_its_folder(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = copy(fixtures_dir / "torch/dcp_fsdp2_2r/ckpt", tmp_path / "src")
    path = folder / ".metadata"
    assert b"__0_0.distcp" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../_0.distcp"))
    shutil.copy(folder / "__0_0.distcp", tmp_path / "_0.distcp")
    assert "../_0.distcp" in refused(folder, tmp_path)


# ---------------------------------------------------------------- pickles


class Bomb:
    """Runs a command when a careless loader builds it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def archive(pickled: bytes, name: str = "archive/data.pkl") -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as f:
        f.writestr(name, pickled)
        f.writestr("archive/version", "3\n")
        f.writestr("archive/byteorder", "little")
    return raw.getvalue()


TARGETS = {
    "torch/hf_bin_sharded/ckpt": "*.bin",
    "torch/ddp_torchsave_2r/ckpt": "*.pt",
    "torch/dcp_fsdp2_2r/ckpt": ".metadata",
    "torch/dtensor_ranksave_2x2/ckpt": "*rank*",
    "deepspeed/z3_dp2_bf16/ckpt": "*/*model_states.pt",
    "deepspeed/z2_dp2_fp16/ckpt": "*/*optim_states.pt",
    "megatron/llama_tp2pp2/torch": "*/*/model_optim_rng.pt",
    "megatron/llama_tp2pp2/torch_dist": "*/common.pt",
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "zip"])
@pytest.mark.parametrize("case", TARGETS)
def test_hostile_pickles(
    fixtures_dir: Path, tmp_path: Path, case: str, wrapped: bool, protocol: int
) -> None:
    canary = tmp_path / "canary"
    folder = copy(fixtures_dir / case, tmp_path / "src")
    victim = min(folder.glob(TARGETS[case]))
    for content in (Bomb(canary), {"model": Bomb(canary), "module": {"w": Bomb(canary)}}):
        raw = pickle.dumps(content, protocol)
        victim.write_bytes(archive(raw) if wrapped else raw)
        said = refused(folder, tmp_path, "--vocab-size", 317)
        assert victim.name in said or victim.parent.name in said
        refused(victim, tmp_path, "--vocab-size", 317)
        assert mconv("inspect", folder).code in (0, 2)  # it may say what else there is
        assert not canary.exists()
    assert not pickle.loads(raw) or canary.exists()  # it does run elsewhere


def test_bombs_beside_honest_weights_stay_inert(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    canary = tmp_path / "canary"
    state = {"model": {"w": torch.ones(4, 4)}, "args": Bomb(canary), "hooks": [eval, Bomb(canary)]}
    torch.save(state, tmp_path / "run.pt")
    done = mconv("reshard", tmp_path / "run.pt", tmp_path / "hf")
    assert done.code == 0, done.err
    assert not canary.exists()


def test_archive_entries_outside(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "pytorch_model.bin"
    path.write_bytes(archive(pickle.dumps(Bomb(canary)), "../archive/data.pkl"))
    assert path.name in refused(path, tmp_path)
    assert not canary.exists()


# ---------------------------------------------------------------- no checkpoint at all

FOREIGN = {
    "empty": b"",
    "text": b"hello\n" * 100,
    "png": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "gzip": b"\x1f\x8b\x08" + bytes(200),
    "elf": b"\x7fELF" + bytes(200),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(200),
    "gguf": b"GGUF\x03\0\0\0" + bytes(200),
    "tar": bytes(257) + b"ustar\x0000" + bytes(300),
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "random": bytes((i * 7919 + (i >> 3)) % 251 for i in range(5000)),
}
NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.pt",
    "data.bin",
    "mp_rank_00_model_states.pt",
)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", NAMES)
def test_foreign_files(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / name
    path.write_bytes(FOREIGN[kind])
    for source in (path, path.parent):
        said = refused(source, tmp_path)
        assert name in said or str(path.parent) in said


def test_foreign_places(tmp_path: Path) -> None:
    (tmp_path / "src" / "sub").mkdir(parents=True)
    (tmp_path / "src" / "README.md").write_text("# no model\n")
    (tmp_path / "src" / "loop").symlink_to(tmp_path / "src")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    for source in ("src", "src/sub", "src/README.md", "circle", "pipe", "nowhere", "src/loop"):
        assert str(tmp_path / source) in refused(tmp_path / source, tmp_path)
    for device in ("/dev/null", "/dev/zero"):
        assert device in refused(Path(device), tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    os.mkfifo(tmp_path / "src" / "model.safetensors")
    done = process("reshard", tmp_path / "src", tmp_path / "out" / "hf", timeout=60)
    assert "model.safetensors" in assert_refused(done, tmp_path / "out")


# ---------------------------------------------------------------- configs and tokenizers

KEYS = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size",
    "intermediate_size", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
    "architectures", "model_type", "head_dim", "tie_word_embeddings",
)  # fmt: skip
NONSENSE = (
    0,
    -1,
    7,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "x",
    None,
    True,
    [],
    [1],
    {},
    {"a": 1},
)


@pytest.mark.parametrize("key", KEYS)
def test_nonsense_in_the_config(tmp_path: Path, key: str) -> None:
    folder = copy(HF, tmp_path / "src")
    good = json.loads((folder / "config.json").read_text())
    for value in NONSENSE:
        (folder / "config.json").write_text(json.dumps({**good, key: value}))
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        done = mconv("to-gguf", folder, out / "m.gguf", "--type", "q8_0")
        if done.code == 0:  # a value of no effect on the layout, or one that is the default
            (out / "m.gguf").unlink()
        else:
            assert_refused(done, out)


JSON_DOCUMENTS = ("", "{", "[]", "null", "1e999", '"x"', "{" * 50_000, '{"a": NaN}', "\x00", "[[[[")


@pytest.mark.parametrize("text", JSON_DOCUMENTS, ids=range(len(JSON_DOCUMENTS)))
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_malformed_documents(tmp_path: Path, name: str, text: str) -> None:
    folder = copy(HF, tmp_path / "src")
    if name == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
    (folder / name).write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    done = mconv("to-gguf", folder, out / "m.gguf")
    if done.code == 0:
        assert name == "tokenizer_config.json", done.out
    else:
        assert name in assert_refused(done, out) or name == "config.json"


@pytest.mark.parametrize("kind", FOREIGN)
def test_tokenizers_of_another_kind(tmp_path: Path, kind: str) -> None:
    folder = copy(HF, tmp_path / "src")
    (folder / "tokenizer.model").write_bytes(FOREIGN[kind])
    assert "tokenizer.model" in refused(folder, tmp_path, command="to-gguf")
