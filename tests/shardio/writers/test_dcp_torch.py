"""torch itself reads our DCP folders: metadata, any world size, pieces on a mesh, HF form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv import Layout, open_checkpoint, reshard
from mconv.shardio import Checkpoint

from .models import make, write

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.checkpoint")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def bits(t: Any) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def template(ckpt: Checkpoint) -> dict[str, Any]:
    """An empty state dict for everything that a checkpoint should hold."""

    def hollow(shape: tuple[int, ...]) -> Any:
        return torch.full(shape, float("nan"))

    model = {n: hollow(t.shape) for n, t in ckpt.weights.items()}
    model |= {a: hollow(ckpt.weights[o].shape) for a, o in ckpt.tied.items()}
    states = {
        n: {
            "step": hollow(()),
            **{s: hollow(ckpt.weights[n].shape) for s in ("exp_avg", "exp_avg_sq")},
        }
        for n in ckpt.optimizer["exp_avg"]
    }
    groups = [dict.fromkeys((*g, "initial_lr")) for g in ckpt.scalars["param_groups"]]
    return {"model": model, "optim": {"state": states, "param_groups": groups}}


@pytest.mark.parametrize("text", ["dcp", "dcp:dp=3", "dcp:dp=2,tp=3", "dcp:dp=9,tp=2"])
@pytest.mark.parametrize("tied", [False, True])
def test_dcp_load(tmp_path: Path, text: str, tied: bool) -> None:
    import torch.distributed.checkpoint as dcp

    ckpt = make(21, tied=tied)
    folder = write(ckpt, Layout.parse(text), tmp_path / "out")
    state = template(ckpt)
    dcp.load(state, checkpoint_id=str(folder))
    masters = ckpt.optimizer["master"]
    for name in state["model"]:
        want = masters[ckpt.tied.get(name, name)]
        assert bits(state["model"][name]) == want.read().tobytes(), name
    for name, part in state["optim"]["state"].items():
        assert part["step"] == ckpt.step
        for kind in ("exp_avg", "exp_avg_sq"):
            assert bits(part[kind]) == ckpt.optimizer[kind][name].read().tobytes()
    for got, want in zip(state["optim"]["param_groups"], ckpt.scalars["param_groups"], strict=True):
        assert got["params"] == want["params"]
        assert got["betas"] == tuple(want["betas"])
        assert got["weight_decay"] == want["weight_decay"]


def test_metadata_is_what_torch_expects(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

    folder = write(make(4), Layout.parse("dcp:dp=2,tp=2"), tmp_path / "out")
    metadata = FileSystemReader(str(folder)).read_metadata()
    assert isinstance(metadata, Metadata)
    entry = metadata.state_dict_metadata["model.model.layers.0.mlp.down_proj.weight"]
    assert entry.properties.dtype == torch.float32
    assert len(entry.chunks) == 4
    assert metadata.planner_data["optim.param_groups.0.lr"] == ("optim", "param_groups", 0, "lr")
    for index in metadata.storage_data:
        assert isinstance(index.offset, torch.Size) or index.offset is None


def test_the_chunk_grid_is_torchs(fixtures_dir: Path, tmp_path: Path) -> None:
    """A fixture of FSDP2 x TP resharded to its own mesh has the same pieces on the same ranks."""
    from torch.distributed.checkpoint import FileSystemReader

    source = fixtures_dir / "torch" / "dcp_fsdp2_tp_2x2" / "ckpt"
    reshard(source, tmp_path / "out", Layout.parse("dcp:dp=2,tp=2"))
    ours, theirs = (FileSystemReader(str(p)).read_metadata() for p in (tmp_path / "out", source))
    assert {*ours.state_dict_metadata} - {"optim.param_groups.0.initial_lr"} == {
        *theirs.state_dict_metadata
    }
    for key, entry in theirs.state_dict_metadata.items():
        if hasattr(entry, "chunks"):
            mine = ours.state_dict_metadata[key]
            assert {(c.offsets, c.sizes) for c in mine.chunks} == {
                (c.offsets, c.sizes) for c in entry.chunks
            }, key
    placed = [{(k.fqn, k.offset): v.relative_path for k, v in m.storage_data.items()}
              for m in (ours, theirs)]  # fmt: skip
    cut = "model.model.layers.0.self_attn.o_proj.weight"
    assert {k: v for k, v in placed[0].items() if k[0] == cut} == {
        k: v for k, v in placed[1].items() if k[0] == cut
    }


def test_hf_pieces_are_read_and_consolidated_by_torch(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    ckpt = make(33, dtype="float32", optimizer=False)
    folder = write(ckpt, Layout.parse("hf-dcp:dp=3,tp=2"), tmp_path / "out")
    state = {n: torch.zeros(t.shape) for n, t in ckpt.weights.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(path=str(folder)))
    for name, tensor in ckpt.weights.items():
        np.testing.assert_array_equal(state[name].numpy(), tensor.read())


def test_torch_file_continues_in_torch(tmp_path: Path) -> None:
    """The optimizer loads into torch.optim.AdamW and its next step is the same."""
    ckpt = make(17, dtype="float32")
    folder = write(ckpt, Layout("torch"), tmp_path / "out")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    order = [n for g in saved["optimizer"]["param_groups"] for n in g["param_names"]]
    params = {n: torch.nn.Parameter(saved["model"][n].clone()) for n in order}
    groups = [{"params": [params[n] for n in g["param_names"]]}
              for g in saved["optimizer"]["param_groups"]]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=123.0)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    name, t = order[0], ckpt.step + 1
    m = 0.9 * ckpt.optimizer["exp_avg"][name].read() + 0.1
    v = 0.95 * ckpt.optimizer["exp_avg_sq"][name].read() + 0.05
    w = ckpt.weights[name].read() * (1 - 0.01 * 0.1)
    step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    np.testing.assert_allclose(params[name].detach().numpy(), w - 0.01 * step, rtol=2e-5, atol=1e-6)


def test_opened_again_says_the_mesh(tmp_path: Path) -> None:
    folder = write(make(9), Layout.parse("dcp:dp=2,tp=2"), tmp_path / "out")
    layout = open_checkpoint(folder).layout
    assert (layout.tp, layout.dp) == (2, 2)
