"""The frameworks' own converters on checkpoints, in a process of its own.

``python official_tools.py REQUEST.json RESULT.json``: the request is a list of [tool, arguments,
...], the result has for each the type of the error it raised ("" if none), its message, and what it
returned. Tensors go into safetensors files that the request names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = Any


def zero_to_fp32(folder: str, out: str) -> Result:
    """DeepSpeed's merge of ZeRO ranks; saves what it gives, in fp32."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import save_file

    state = get_fp32_state_dict_from_zero_checkpoint(folder)
    save_file({n: t.float().contiguous().clone() for n, t in state.items()}, out)
    return sorted(state)


def zero_to_fp32_files(folder: str, out: str, size: str, safe: bool) -> Result:
    """The same, writing files as the command does; returns their sizes."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(
        folder, out, max_shard_size=size, safe_serialization=safe
    )
    return {p.name: p.stat().st_size for p in Path(out).iterdir()}


def ds_to_universal(folder: str, out: str) -> Result:
    """DeepSpeed's universal checkpoint of a tag folder."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=folder, output_folder=out, num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, no_strict=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip


def elastic(folder: str) -> Result:
    """Rewrite the optimizer files of a ZeRO-2 tag folder as an elastic checkpoint has them."""
    import torch

    for path in Path(folder).glob("*optim_states.pt"):
        state = torch.load(path, weights_only=False)
        inner = state["optimizer_state_dict"]
        base = inner["base_optimizer_state"]["state"]
        lean = [t.numel() for t in inner["single_partition_of_fp32_groups"]]
        inner["base_optimizer_state"] = [
            {k: base[g][k][:n].clone() for k in ("exp_avg", "exp_avg_sq")}
            for g, n in enumerate(lean)
        ]
        inner["base_optimizer_state_step"] = 3
        torch.save(state, path)


def save_hf_pieces(folder: str, values: dict[str, Any]) -> Result:
    """Let torch write pieces for later consolidation; numbers become tensors by their dtype."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    state = {n: torch.tensor(v[1], dtype=getattr(torch, v[0])) for n, v in values.items()}
    names = dict.fromkeys(state, 1)
    writer = HuggingFaceStorageWriter(folder, fqn_to_index_mapping=names, save_distributed=True)
    dcp.save(state, storage_writer=writer, no_dist=True)
    return sorted(p.name for p in Path(folder).iterdir())


def consolidate(folder: str, out: str, names: list[str]) -> Result:
    """torch's consolidation of such pieces; returns what it made of each tensor."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint._consolidate_hf_safetensors import (
        consolidate_safetensors_files,
    )

    Path(out).mkdir()
    consolidate_safetensors_files(folder, out, dict.fromkeys(names, 1))
    found = {}
    for path in Path(out).glob("*.safetensors"):
        found |= {n: t.tolist() for n, t in load_file(path).items()}
    return found


def dcp_to_torch(folder: str, out: str) -> Result:
    """torch's merge of a distributed checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, out)


def dcp_metadata(folder: str) -> Result:
    """torch's reading of a .metadata, which executes what it names."""
    from torch.distributed.checkpoint import FileSystemReader

    FileSystemReader(folder).read_metadata()


def torch_load(path: str, safely: bool) -> Result:
    """``torch.load``, as the frameworks' loaders call it."""
    import torch

    torch.load(path, map_location="cpu", weights_only=safely)


def merge_fsdp(folder: str, out: str) -> Result:
    """``accelerate merge-weights``."""
    from accelerate.utils import merge_fsdp_weights

    merge_fsdp_weights(folder, out)
    return sorted(p.name for p in Path(out).iterdir())


def drop_chunks(folder: str, part: str) -> Result:
    """Take every second chunk of the expert weights out of a .metadata, as saves with expert
    tensor parallelism once did.
    """
    import pickle

    path = Path(folder) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    touched = []
    for key, entry in metadata.state_dict_metadata.items():
        chunks = getattr(entry, "chunks", ())
        if part in key and len(chunks) > 1:
            entry.chunks = chunks[::2]
            touched.append(key)
    path.write_bytes(pickle.dumps(metadata))
    return touched


TOOLS: dict[str, Callable[..., Result]] = {
    f.__name__: f
    for f in (
        zero_to_fp32, zero_to_fp32_files, ds_to_universal, elastic, save_hf_pieces, consolidate,
        dcp_to_torch, dcp_metadata, torch_load, merge_fsdp, drop_chunks,
    )
}  # fmt: skip


def main() -> None:
    """Run the requested tools one after the other."""
    results = []
    for tool, *args in json.loads(Path(sys.argv[1]).read_text()):
        error = message = ""
        value: Result = None
        try:
            value = TOOLS[tool](*args)
        except BaseException as e:  # torch's CheckpointException is no Exception
            error, message = type(e).__name__, str(e)
        results.append([error, message, value])
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
