"""Make a huge DCP checkpoint that takes no disk space, to time opening and planning.

Shapes of a dense Llama-like model, sharded on dim 0 over any number of ranks, with or without Adam
states. Archive heads and directories are real, tensor bytes are holes of sparse files. Usage:
``python benchmarks/make_sparse.py DIR --gigabytes 100 --ranks 16`` then ``--time DIR``.
"""

from __future__ import annotations

import argparse
import pickle
import struct
import sys
import time
import types
from pathlib import Path
from typing import Any, BinaryIO

_ITEM = 2  # bytes of a bfloat16
_METADATA = "torch.distributed.checkpoint.metadata"


def shapes(layers: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a dense model."""
    inner, vocab = hidden * 7 // 2, 128_256
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        base = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            rows = hidden // 4 if name in "kv" else hidden
            size = (hidden, rows) if name == "o" else (rows, hidden)
            found[f"{base}self_attn.{name}_proj.weight"] = size
        found |= {f"{base}mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        found[f"{base}mlp.down_proj.weight"] = (hidden, inner)
        found |= {f"{base}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def tensor_pickle(size: tuple[int, ...]) -> bytes:
    """Return the data.pkl of one contiguous bfloat16 tensor, as torch.save writes it."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def tuple_of(values: list[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    count, strides = 1, []
    for n in reversed(size):
        strides.insert(0, count)
        count *= n
    storage = b"(" + text("storage") + b"ctorch\nBFloat16Storage\n" + text("0") + text("cpu")
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage + number(count) + b"tQ" + number(0))
        + (tuple_of(list(size)) + tuple_of(strides))
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


def write_item(file: BinaryIO, size: tuple[int, ...], nbytes: int) -> int:
    """Write one archive with a hole for the data; return its length in bytes."""
    start = file.tell()
    central = b""
    entries = [("archive/data.pkl", tensor_pickle(size)), ("archive/byteorder", b"little")]
    for name, content in [*entries, ("archive/data/0", None)]:
        at = file.tell() - start
        length = nbytes if content is None else len(content)
        pad = -(at + 30 + len(name) + 4) % 64 if content is None else 0
        extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
        local = (*(0,) * 5, 0, length, length, len(name), len(extra))
        file.write(struct.pack("<4s5H3L2H", b"PK\3\4", *local) + name.encode() + extra)
        file.write(content) if content is not None else file.seek(nbytes, 1)
        head = (*(0,) * 6, 0, length, length, len(name), *(0,) * 5, at)
        central += struct.pack("<4s6H3L5H2L", b"PK\1\2", *head) + name.encode()
    at = file.tell() - start
    file.write(central)
    file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(central), at, 0))
    return file.tell() - start


def fake_classes() -> types.SimpleNamespace:
    """Return stand-ins that pickle under torch's names, so that torch is not needed."""

    def module(name: str) -> types.ModuleType:
        return sys.modules.setdefault(name, types.ModuleType(name))

    def cls(where: str, name: str) -> type:
        made = type(name, (), {"__module__": where})
        setattr(module(where), name, made)
        return made

    torch = module("torch")
    dtype = cls("torch", "dtype")
    dtype.__reduce__ = lambda self: "bfloat16"  # type: ignore[method-assign,assignment]  # pickles as a global
    torch.bfloat16 = dtype()  # type: ignore[attr-defined]  # a made-up module
    torch.Size = type("Size", (tuple,), {"__module__": "torch"})  # type: ignore[attr-defined]  # same
    names = ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties")
    made = {n: cls(_METADATA, n) for n in (*names, "MetadataIndex")}
    made["TensorProperties"].__getstate__ = lambda self: self.state  # type: ignore[attr-defined]  # same
    info = cls("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    return types.SimpleNamespace(**made, StorageInfo=info, torch=torch)


def make(folder: Path, gigabytes: float, ranks: int, optimizer: bool) -> tuple[int, int]:
    """Write the checkpoint; return (items, bytes of tensor data)."""
    folder.mkdir(parents=True)
    fake = fake_classes()

    def new(cls: type, **fields: Any) -> Any:
        made = cls()
        made.__dict__.update(fields)
        return made

    states = ("", "exp_avg", "exp_avg_sq") if optimizer else ("",)
    layers, hidden = 80, 1024
    while sum(_numel(s) for s in shapes(layers, hidden).values()) * _ITEM * len(states) < (
        gigabytes * 1e9
    ):
        hidden += 256
    tensors, storage, planner, total = {}, {}, {}, 0
    properties = new(fake.TensorProperties, state=(fake.torch.bfloat16, None, False, None, False))
    files = [(folder / f"__{r}_0.distcp").open("wb") for r in range(ranks)]
    for name, size in shapes(layers, hidden).items():
        step = -(-size[0] // ranks)
        for state in states:
            path = ("optim", "state", name, state) if state else ("model", name)
            key, chunks = ".".join(path), []
            for r in range(ranks):
                rows = min(size[0], (r + 1) * step) - r * step
                if rows <= 0:
                    continue
                part, at = (rows, *size[1:]), (r * step, *(0,) * (len(size) - 1))
                start = files[r].tell()
                length = write_item(files[r], part, _numel(part) * _ITEM)
                total += _numel(part) * _ITEM
                chunks.append(
                    new(
                        fake.ChunkStorageMetadata,
                        offsets=fake.torch.Size(at),
                        sizes=fake.torch.Size(part),
                    )
                )
                index = new(fake.MetadataIndex, fqn=key, offset=fake.torch.Size(at), index=r)
                place = {"relative_path": f"__{r}_0.distcp", "offset": start, "length": length}
                storage[index] = new(fake.StorageInfo, **place)
            planner[key] = path
            tensors[key] = new(
                fake.TensorStorageMetadata,
                properties=properties,
                size=fake.torch.Size(size),
                chunks=chunks,
            )
    for f in files:
        f.close()
    fields = {"state_dict_metadata": tensors, "planner_data": planner, "storage_data": storage}
    data = pickle.dumps(new(fake.Metadata, **fields, storage_meta=None, version="1.0.0"), 4)
    (folder / ".metadata").write_bytes(data)
    return len(storage), total


def _numel(size: tuple[int, ...]) -> int:
    count = 1
    for n in size:
        count *= n
    return count


def main() -> None:
    """Make a checkpoint, or time opening one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=100)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--no-optimizer", action="store_true")
    parser.add_argument("--time", action="store_true", help="time opening DIR instead")
    args = parser.parse_args()
    if not args.time:
        items, total = make(args.folder, args.gigabytes, args.ranks, not args.no_optimizer)
        sys.stdout.write(f"{items} items, {total / 1e9:.1f} GB\n")
        return
    from mconv.shardio.registry import open_checkpoint

    for _ in range(3):
        start, busy = time.perf_counter(), time.process_time()
        checkpoint = open_checkpoint(args.folder)
        took, cpu = time.perf_counter() - start, time.process_time() - busy
        count = len(checkpoint.weights)
        sys.stdout.write(f"{count} weights opened in {took:.2f} s ({cpu:.2f} s of CPU)\n")


if __name__ == "__main__":
    main()
