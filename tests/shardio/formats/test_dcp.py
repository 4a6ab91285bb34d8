"""PyTorch distributed checkpoints: all fixtures bit for bit, and broken ones refused by name."""

from __future__ import annotations

import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.errors import FormatError, MconvError
from mconv.shardio.dcp_metadata import read_dcp_metadata
from mconv.shardio.registry import locate, open_checkpoint

from .torch_cases import assert_equals_truth, cut, load_truth, swap, writable_copy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CASES = [
    "accelerate_fsdp2_2r",
    "dcp_edge_4r",
    "dcp_fsdp2_2r",
    "dcp_fsdp2_tp_2x2",
    "dcp_safetensors_fmt_2r",
    "dcp_threads_2r",
    "dcp_zstd_2r",
    "pp_stages_2r",
]


def test_an_optimizer_flattened_beside_the_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    dcp.save({**weights, **states}, checkpoint_id=tmp_path / "c", no_dist=True)
    found = open_checkpoint(tmp_path / "c")
    assert set(found.weights) == {"weight", "bias"} and found.step == 1
    for name, p in model.named_parameters():
        got = found.optimizer["exp_avg"][name].read()
        assert np.array_equal(got, optimizer.state[p]["exp_avg"].numpy())


@pytest.mark.parametrize("case", CASES)
def test_equals_truth(fixtures_dir: Path, case: str) -> None:
    folder = fixtures_dir / "torch" / case
    if case == "dcp_zstd_2r":
        pytest.importorskip("zstandard")
    checkpoint = open_checkpoint(folder / "ckpt")
    assert checkpoint.format == "dcp"
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


def test_edge_dtypes_are_kept(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "torch" / "dcp_edge_4r"
    checkpoint = open_checkpoint(folder / "ckpt")
    for name, value in load_truth(folder / "truth.safetensors").items():
        assert checkpoint.weights[name].dtype == value.dtype, name
    assert checkpoint.step == 12
    assert checkpoint.args["cfg"] == {"lr": 0.001, "name": "x", "flags": [True, False]}


def test_layout_and_optimizer_settings(fixtures_dir: Path) -> None:
    checkpoint = open_checkpoint(fixtures_dir / "torch" / "dcp_fsdp2_tp_2x2" / "ckpt")
    assert (checkpoint.layout.tp, checkpoint.layout.dp) == (2, 2)
    name = "model.layers.0.mlp.down_proj.weight"
    assert {k: str(p) for k, p in checkpoint.placements[name].items()} == {
        "mesh0": "Shard(0)",
        "mesh1": "Shard(1)",
    }
    assert checkpoint.step == 3
    (group,) = checkpoint.scalars["param_groups"]
    assert (group["lr"], group["betas"]) == (0.01, [0.9, 0.95])
    assert sorted(group["params"]) == sorted(checkpoint.weights)


def test_flattened_optimizer_and_schedule(fixtures_dir: Path) -> None:
    checkpoint = open_checkpoint(fixtures_dir / "torch" / "pp_stages_2r" / "ckpt")
    (group,) = checkpoint.scalars["param_groups"]
    assert sorted(group["params"]) == sorted(checkpoint.weights)
    assert checkpoint.scalars["lr_scheduler"]["last_epoch"] is not None
    assert checkpoint.args["train_state"]["step"] == 3


@pytest.mark.parametrize("inner", ["", "pytorch_model_fsdp_0", "optimizer_0"])
def test_accelerate_folders_find_each_other(fixtures_dir: Path, inner: str) -> None:
    fmt, root = locate(fixtures_dir / "torch" / "accelerate_fsdp2_2r" / "ckpt" / inner)
    assert (fmt.name, root.name) == ("dcp", "pytorch_model_fsdp_0")


def test_a_rank_file_finds_its_folder(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "torch" / "dcp_fsdp2_2r" / "ckpt"
    assert locate(folder / "__1_0.distcp")[1] == folder
    assert locate(folder / ".metadata")[1] == folder


@pytest.mark.parametrize("case", ["dcp_fsdp2_2r", "dcp_threads_2r"])
def test_items_are_plain_file_ranges(fixtures_dir: Path, case: str) -> None:
    """What ``locate`` promises to the kernel copies is what ``read`` gives."""
    checkpoint = open_checkpoint(fixtures_dir / "torch" / case / "ckpt")
    for tensor in checkpoint.weights.values():
        for chunk in tensor.chunks:  # type: ignore[attr-defined]  # a Chunked
            source, at = chunk.source.locate(chunk.offset)
            assert source.path == chunk.source.path
            box = tuple(slice(a, b) for a, b in zip(chunk.lo, chunk.hi, strict=True))
            data = tensor.read(box).tobytes()
            assert source.path.read_bytes()[at : at + len(data)] == data


def test_compressed_items_have_no_place_in_the_file(fixtures_dir: Path) -> None:
    checkpoint = open_checkpoint(fixtures_dir / "torch" / "dcp_zstd_2r" / "ckpt")
    chunk = checkpoint.weights["model.norm.weight"].chunks[0]  # type: ignore[attr-defined]  # a Chunked
    assert chunk.source.locate(chunk.offset) is None


def test_no_framework_is_imported(fixtures_dir: Path) -> None:
    code = (
        "import sys; from mconv.shardio.registry import open_checkpoint as o;"
        f"c = o({str(fixtures_dir / 'torch' / 'dcp_fsdp2_2r' / 'ckpt')!r});"
        "next(iter(c.weights.values())).read();"
        "assert not {'torch', 'transformers', 'accelerate', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- broken checkpoints ---------------------------------------------------------------------------


def _edit(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the metadata with torch's own classes."""
    pytest.importorskip("torch")
    data = pickle.loads((folder / ".metadata").read_bytes())
    change(data)
    (folder / ".metadata").write_bytes(pickle.dumps(data))


def _first_path(value: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        next(iter(data.storage_data.values())).relative_path = value

    return change


def _shrink_chunk(data: Any) -> None:
    import torch

    chunk = data.state_dict_metadata["model.model.norm.weight"].chunks[0]
    chunk.sizes = torch.Size([chunk.sizes[0] - 1])


def _grow_tensor(data: Any) -> None:
    import torch

    entry = data.state_dict_metadata["model.model.norm.weight"]
    entry.size = torch.Size([entry.size[0] + 8])


def _drop_item(data: Any) -> None:
    index = next(i for i in data.storage_data if i.fqn == "model.model.norm.weight")
    del data.storage_data[index]


def _shift_chunk(data: Any) -> None:
    import torch

    chunks = data.state_dict_metadata["model.model.norm.weight"].chunks
    chunks[1].offsets = torch.Size([chunks[1].offsets[0] - 1])
    item = next(
        (i, v)
        for i, v in data.storage_data.items()
        if i.fqn == "model.model.norm.weight" and i.index
    )
    del data.storage_data[item[0]]
    data.storage_data[type(item[0])(item[0].fqn, chunks[1].offsets, 1)] = item[1]


def _huge_length(data: Any) -> None:
    next(iter(data.storage_data.values())).length = 1 << 60


def _negative_offset(data: Any) -> None:
    next(iter(data.storage_data.values())).offset = -8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_first_path("../__0_0.distcp"), "outside the checkpoint folder"),
        (_first_path("/etc/passwd"), "outside the checkpoint folder"),
        (_first_path("..\\x.distcp"), "outside the checkpoint folder"),
        (_first_path("C:/x.distcp"), "outside the checkpoint folder"),
        (_first_path("__7_0.distcp"), "__7_0.distcp"),
        (_shrink_chunk, "model.norm.weight"),
        (_grow_tensor, "model.norm.weight"),
        (_drop_item, "model.norm.weight"),
        (_shift_chunk, "model.norm.weight"),
        (_huge_length, "truncated"),
        (_negative_offset, "offset"),
    ],
)
def test_lying_metadata(
    fixtures_dir: Path, tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    folder = writable_copy(fixtures_dir / "torch" / "dcp_fsdp2_2r" / "ckpt", tmp_path / "c")
    _edit(folder, change)
    with pytest.raises(FormatError, match=re.escape(words)):
        open_checkpoint(folder)


@pytest.mark.parametrize("case", ["dcp_fsdp2_2r", "dcp_safetensors_fmt_2r", "dcp_threads_2r"])
def test_missing_file(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    folder = writable_copy(fixtures_dir / "torch" / case / "ckpt", tmp_path / "c")
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(FormatError, match=r"__1_0\.distcp"):
        open_checkpoint(folder)


@pytest.mark.parametrize("case", ["dcp_fsdp2_2r", "dcp_safetensors_fmt_2r", "dcp_zstd_2r"])
def test_one_byte_cut(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    folder = writable_copy(fixtures_dir / "torch" / case / "ckpt", tmp_path / "c")
    cut(folder / "__0_0.distcp")
    with pytest.raises(FormatError, match=r"__0_0\.distcp"):
        open_checkpoint(folder)


def test_cut_metadata(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = writable_copy(fixtures_dir / "torch" / "dcp_fsdp2_2r" / "ckpt", tmp_path / "c")
    cut(folder / ".metadata")
    with pytest.raises(FormatError, match="metadata"):
        open_checkpoint(folder)


@pytest.mark.parametrize("case", ["dcp_edge_4r", "dcp_fsdp2_tp_2x2", "pp_stages_2r"])
def test_swapped_rank_files(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    source = fixtures_dir / "torch" / case / "ckpt"
    folder = writable_copy(source if case != "pp_stages_2r" else source / "step-3", tmp_path / "c")
    swap(folder / "__0_0.distcp", folder / "__1_0.distcp")
    with pytest.raises(FormatError, match="another rank or another save"):
        open_checkpoint(folder)


def test_swapped_safetensors_files(fixtures_dir: Path, tmp_path: Path) -> None:
    """Equal sizes, equal names: only the offsets in the headers tell."""
    source = fixtures_dir / "torch" / "dcp_safetensors_fmt_2r" / "ckpt"
    folder = writable_copy(source, tmp_path / "c")
    swap(folder / "__0_0.distcp", folder / "__1_0.distcp")
    with pytest.raises(FormatError, match="different ranks or saves"):
        open_checkpoint(folder)


def test_unfinished_saves(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = writable_copy(fixtures_dir / "torch" / "dcp_fsdp2_2r" / "ckpt", tmp_path / "c")
    metadata = folder / ".metadata"
    (folder / ".metadata.tmp").write_bytes(metadata.read_bytes())
    with pytest.raises(FormatError, match="did not finish"):
        open_checkpoint(folder)
    metadata.unlink()
    with pytest.raises(FormatError, match="did not finish"):
        open_checkpoint(folder)
    (folder / ".metadata.tmp").unlink()
    with pytest.raises(FormatError, match=r"no \.metadata"):
        open_checkpoint(folder)


def test_stale_files_are_reported(fixtures_dir: Path, tmp_path: Path) -> None:
    source = fixtures_dir / "torch" / "dcp_fsdp2_2r"
    folder = writable_copy(source / "ckpt", tmp_path / "c")
    (folder / "__2_0.distcp").write_bytes((folder / "__1_0.distcp").read_bytes())
    checkpoint = open_checkpoint(folder)
    assert any("__2_0.distcp" in w for w in checkpoint.warnings)
    assert_equals_truth(checkpoint, load_truth(source / "truth.safetensors"))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/mconv-must-not-exist", "w"))


@pytest.mark.parametrize("content", [pickle.dumps(_Bomb()), pickle.dumps({"a": 1}), b"", b"PK\3\4"])
def test_hostile_metadata(fixtures_dir: Path, tmp_path: Path, content: bytes) -> None:
    folder = writable_copy(fixtures_dir / "torch" / "dcp_threads_2r" / "ckpt", tmp_path / "c")
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(MconvError):
        open_checkpoint(folder)
    assert not Path("/tmp/mconv-must-not-exist").exists()


def test_item_of_another_shape_is_found_when_read(fixtures_dir: Path, tmp_path: Path) -> None:
    """An item in the middle of a file is not looked at before its tensor is read."""
    folder = writable_copy(fixtures_dir / "torch" / "dcp_fsdp2_2r" / "ckpt", tmp_path / "c")

    def exchange(data: Any) -> None:
        items = [
            i for i in data.storage_data if i.fqn.endswith(("q_proj.weight", "gate_proj.weight"))
        ]
        a = next(i for i in items if i.fqn == "model.model.layers.0.self_attn.q_proj.weight")
        b = next(i for i in items if i.fqn == "model.model.layers.0.mlp.gate_proj.weight")
        places = data.storage_data
        places[a], places[b] = places[b], places[a]

    _edit(folder, exchange)
    tensor = open_checkpoint(folder).weights["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(FormatError, match="promises"):
        tensor.read()


# -- variants made here with torch ----------------------------------------------------------------


def _save(folder: Path, state: dict[str, Any], **options: Any) -> None:
    torch = pytest.importorskip("torch")
    dcp = torch.distributed.checkpoint
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **options), no_dist=True)


@pytest.mark.parametrize("single", [True, False])
def test_single_process_save(tmp_path: Path, single: bool) -> None:
    torch = pytest.importorskip("torch")
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4).half()}
    _save(tmp_path / "c", {"model": weights, "epoch": 7}, single_file_per_rank=single)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert sorted(checkpoint.weights) == ["a.weight", "b.bias"]
    assert np.array_equal(checkpoint.weights["a.weight"].read(), np.arange(6.0).reshape(2, 3))
    assert checkpoint.args["epoch"] == 7


def test_numbered_optimizer_is_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    _save(tmp_path / "c", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    checkpoint = open_checkpoint(tmp_path / "c")
    assert sorted(checkpoint.optimizer) == ["exp_avg", "exp_avg_sq"]
    for i, name in enumerate(model.state_dict()):
        expected = optimizer.state_dict()["state"][i]["exp_avg"].numpy()
        assert np.array_equal(checkpoint.optimizer["exp_avg"][name].read(), expected)
    assert checkpoint.step == 1


def test_a_strided_item_reads_right(tmp_path: Path) -> None:
    """Old savers stored views with their storage; put such an archive in place of an item."""
    torch = pytest.importorskip("torch")
    _save(tmp_path / "c", {"model": {"w": torch.zeros(4, 3)}})
    base = torch.arange(40.0).reshape(8, 5)
    view = base[1:8:2, 1:4]
    assert not view.is_contiguous()
    buffer = io.BytesIO()
    torch.save(view, buffer)
    (tmp_path / "c" / "__0_0.distcp").write_bytes(buffer.getvalue())

    def lengthen(data: Any) -> None:
        next(iter(data.storage_data.values())).length = len(buffer.getvalue())

    _edit(tmp_path / "c", lengthen)
    tensor = open_checkpoint(tmp_path / "c").weights["w"]
    assert np.array_equal(tensor.read(), view.numpy())
    assert np.array_equal(tensor.read([slice(1, 3), slice(2, 3)]), view.numpy()[1:3, 2:3])
    chunk = tensor.chunks[0]  # type: ignore[attr-defined]  # a Chunked
    assert chunk.source.locate(chunk.offset) is None


def test_metadata_per_rank_is_united(fixtures_dir: Path, tmp_path: Path) -> None:
    """Saves without collectives: each rank describes its own chunks; equal ones are copies."""
    source = fixtures_dir / "torch" / "dcp_fsdp2_2r"
    folder = writable_copy(source / "ckpt", tmp_path / "c")
    whole = (folder / ".metadata").read_bytes()
    pytest.importorskip("torch")
    norm = "model.model.norm.weight"
    for rank in (0, 1):
        data = pickle.loads(whole)
        for key, entry in list(data.state_dict_metadata.items()):
            if hasattr(entry, "chunks") and (len(entry.chunks) == 2 and key != norm):
                entry.chunks = [entry.chunks[rank]]
        (folder / f"__{rank}.metadata").write_bytes(pickle.dumps(data))
    (folder / ".metadata").unlink()
    checkpoint = open_checkpoint(folder)
    assert_equals_truth(checkpoint, load_truth(source / "truth.safetensors"))
    copies = checkpoint.replicas["model.norm.weight"]
    assert len(copies) == 1
    assert np.array_equal(copies[0].read(), checkpoint.weights["model.norm.weight"].read())
    (folder / "__0.metadata").unlink()
    with pytest.raises(FormatError, match="ranks 0"):
        read_dcp_metadata(folder)


def test_the_config_ties_the_head(fixtures_dir: Path, tmp_path: Path) -> None:
    import json

    source = fixtures_dir / "torch" / "dcp_threads_2r"
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(source / "ckpt", config=tmp_path / "config.json")
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in checkpoint.weights
    assert len(checkpoint.replicas["model.embed_tokens.weight"]) == 1
