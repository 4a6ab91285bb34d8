"""Mutations of checkpoint folders, for the fuzzer and the tests.

A mutation damages a copy of a folder the way disks, interrupted saves, confused users and
attackers do: bytes, whole files, values inside JSON documents and pickles (with the structure
around them kept whole, so that the damage reaches the code behind the parser). All are functions of
(folder, random generator); the same seed gives the same damage.
"""

from __future__ import annotations

import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random, list[Path]], str]

#: Numbers at which sizes, offsets and counts break.
NUMBERS = (0, 1, 2, 3, -1, 7, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64)
VALUES: tuple[Any, ...] = (
    *NUMBERS, None, True, 0.5, float("nan"), float("inf"), 1e308, "", "..", "../../etc/passwd",
    "/dev/zero", "F32", "\x00", "x" * 300, [], {}, [[]], [-1, 2], {"a": {}}, "model.safetensors",
)  # fmt: skip
_HEAD = 30_000  # bytes at the start of a file in which headers and pickles lie


def files_of(folder: Path) -> list[Path]:
    """Return all files of a folder in a fixed order."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _pick(folder: Path, rng: random.Random) -> Path:
    return rng.choice(files_of(folder))


def _place(size: int, rng: random.Random) -> int:
    """A position in a file: mostly where its structure lies."""
    if rng.random() < 0.4:
        return rng.randrange(max(1, min(size, _HEAD)))
    if rng.random() < 0.5:
        return max(0, size - 1 - rng.randrange(max(1, min(size, 3000))))
    return rng.randrange(max(1, size))


def flip_bits(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Flip one to eight bits."""
    path = _pick(folder, rng)
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        if data:
            data[_place(len(data), rng)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits of {path.name}"


def write_number(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Overwrite one to eight bytes with an awkward number."""
    path = _pick(folder, rng)
    data = bytearray(path.read_bytes())
    width = rng.choice((1, 2, 4, 8))
    at = _place(len(data), rng)
    value = rng.choice(NUMBERS) % (1 << 8 * width)
    data[at : at + width] = value.to_bytes(width, "little")
    path.write_bytes(data)
    return f"number {value} at {at} of {path.name}"


def move_bytes(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Drop, repeat or clear a range."""
    path = _pick(folder, rng)
    data = bytearray(path.read_bytes())
    a, b = sorted((_place(len(data), rng), _place(len(data), rng)))
    b = min(b, a + rng.choice((1, 8, 64, 512, 10**6)))
    kind = rng.choice(("drop", "repeat", "clear"))
    part = bytes(data[a:b])
    data[a:b] = {"drop": b"", "repeat": part * 2, "clear": bytes(len(part))}[kind]
    path.write_bytes(data)
    return f"{kind} bytes {a}..{b} of {path.name}"


def cut(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Cut the end of a file off, often by one byte only."""
    path = _pick(folder, rng)
    size = path.stat().st_size
    keep = rng.choice((max(0, size - 1), 0, size // 2, rng.randrange(size + 1)))
    path.write_bytes(path.read_bytes()[:keep])
    return f"{path.name} cut to {keep} of {size} bytes"


def grow(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Append bytes to a file."""
    path = _pick(folder, rng)
    with path.open("ab") as f:
        f.write(rng.choice((b"\0", b"\n", b"x" * 1000, bytes(70_000))))
    return f"{path.name} grown"


def delete(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Delete a file."""
    path = _pick(folder, rng)
    path.unlink()
    return f"{path.name} deleted"


def replace(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Put a file of another checkpoint in the place of one."""
    path, donor = _pick(folder, rng), rng.choice(donors)
    path.write_bytes(donor.read_bytes())
    return f"{path.name} replaced by {donor.parent.name}/{donor.name}"


def swap(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Swap two files, of one suffix where there are such."""
    first = _pick(folder, rng)
    alike = [p for p in files_of(folder) if p.suffix == first.suffix and p != first]
    second = rng.choice(alike or files_of(folder))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return f"{first.name} and {second.name} swapped"


def copy_aside(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Leave a stale copy of a file under another number beside it."""
    path = _pick(folder, rng)
    digits = [i for i, c in enumerate(path.name) if c.isdigit()]
    name = list(path.name)
    if digits:
        name[rng.choice(digits)] = str(rng.randrange(10))
    target = path.with_name("".join(name) if digits else f"{path.stem}-2{path.suffix}")
    if target != path and not target.is_dir():
        target.write_bytes(path.read_bytes())
    return f"{path.name} also as {target.name}"


def odd_node(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Put a folder, a dangling link or a link in a circle in the place of a file."""
    path = _pick(folder, rng)
    path.unlink()
    kind = rng.choice(("folder", "dangling", "circle"))
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "circle" else path.with_name("nowhere"))
    return f"{path.name} is now a {kind}"


def edit_json(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Change, drop or add one value of a JSON document or safetensors header."""
    paths = [p for p in files_of(folder) if p.suffix in (".json", ".safetensors")]
    if not paths:
        return write_number(folder, rng, donors)
    path = rng.choice(paths)
    raw = path.read_bytes()
    tail = b""
    try:
        if path.suffix == ".safetensors":
            end = 8 + struct.unpack("<Q", raw[:8])[0]
            raw, tail = raw[8:end], raw[end:]
        document, what = _edited(json.loads(raw), rng)
    except (ValueError, struct.error):  # damaged before
        return flip_bits(folder, rng, donors)
    text = json.dumps(document).encode()
    path.write_bytes((struct.pack("<Q", len(text)) if tail else b"") + text + tail)
    return f"{what} in {path.name}"


def _edited(document: Any, rng: random.Random) -> tuple[Any, str]:
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if not isinstance(document, dict | list) or not document:
        return rng.choice(VALUES), "another document"
    walk(document)
    node, key = rng.choice(spots)
    kind = rng.choice(("value", "value", "value", "drop", "rename"))
    if kind == "value":
        node[key] = rng.choice(VALUES)
        return document, f"{key}={node[key]!r:.40}"
    value = node.pop(key)
    if kind == "rename" and isinstance(node, dict):
        node[rng.choice(("", "..", "x", f"{key}.1"))] = value
    return document, f"{kind} {key}"


_FIXED = {"BININT1": 1, "BININT2": 2, "BININT": 4, "BINFLOAT": 8, "BINGET": 1, "BINPUT": 1}
_TEXT = ("BINUNICODE", "SHORT_BINUNICODE", "GLOBAL", "SHORT_BINSTRING")


def edit_pickle(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Change one number or text inside a pickle, keeping its length and its archive whole."""
    paths = [p for p in files_of(folder) if p.suffix in (".pt", ".pth", ".bin", ".distcp")]
    paths += [p for p in files_of(folder) if p.name == ".metadata"]
    if not paths:
        return edit_json(folder, rng, donors)
    path = rng.choice(paths)
    data = bytearray(path.read_bytes())
    base, body = _pickle_in(path, data)
    spots = []
    try:
        for op, arg, at in pickletools.genops(body):
            if op.name in _FIXED or (op.name in _TEXT and arg):
                spots.append((op.name, arg, at))
    except ValueError:
        pass
    if not spots:
        return flip_bits(folder, rng, donors)
    name, arg, at = rng.choice(spots)
    if name in _FIXED:
        width = _FIXED[name]
        new = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        first = base + at + 1
    else:
        text = str(arg).encode()
        first = data.find(text.split(b" ")[-1], base + at)
        width = len(text.split(b" ")[-1])
        new = bytes(rng.choice(b"abz019._/ \x80") for _ in range(width))
        if width > 2 and rng.random() < 0.7:  # change one letter only
            keep = bytearray(data[first : first + width])
            keep[rng.randrange(width)] = new[0]
            new = bytes(keep)
    data[first : first + width] = new
    path.write_bytes(data)
    return f"{name} {arg!r:.40} -> {new!r:.40} in {path.name}"


def _pickle_in(path: Path, data: bytearray) -> tuple[int, bytes]:
    """Return where the first pickle of a file begins, and its bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith("data.pkl"):
                    names = struct.unpack_from("<HH", data, info.header_offset + 26)
                    begin = info.header_offset + 30 + sum(names)
                    return begin, bytes(data[begin : begin + info.file_size])
    except (zipfile.BadZipFile, OSError, struct.error, ValueError, NotImplementedError):
        pass
    return 0, bytes(data)


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, flip_bits, write_number, write_number, move_bytes, cut, cut, grow, delete, replace,
    swap, copy_aside, odd_node, edit_json, edit_json, edit_json, edit_pickle, edit_pickle,
    edit_pickle, edit_pickle,
)  # fmt: skip


def mutate(folder: Path, rng: random.Random, donors: list[Path]) -> str:
    """Damage a folder once or, rarely, a few times; say how."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if files_of(folder):
            done.append(rng.choice(MUTATIONS)(folder, rng, donors))
    return "; ".join(done)
