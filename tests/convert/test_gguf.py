"""The GGUF reader and header writer, against the gguf package and against hostile bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mconv.convert.gguf import KeyValue, TensorSpec, ValueType, build_header, open_gguf
from mconv.convert.gguf.values import (
    boolean,
    f32,
    f32_array,
    i32_array,
    string,
    strings,
    u32,
)
from mconv.errors import FormatError, MconvError, UnsupportedError

ENTRIES = [
    string("general.architecture", "llama"),
    u32("llama.block_count", 2**32 - 1),
    f32("llama.rope.freq_base", 1e6),
    boolean("tokenizer.ggml.add_bos_token", True),
    strings("tokenizer.ggml.tokens", ["<s>", "é", "", "x" * 700]),
    i32_array("tokenizer.ggml.token_type", [1, -2, 3]),
    f32_array("tokenizer.ggml.scores", [0.5, -1000.0]),
    KeyValue("a.u16", ValueType.U16, 65535),
    KeyValue("a.i8", ValueType.I8, -128),
    KeyValue("a.u64", ValueType.U64, 2**64 - 1),
    KeyValue("a.f64", ValueType.F64, 0.1),
    KeyValue("a.bools", ValueType.ARRAY, np.array([1, 0, 1], bool), ValueType.BOOL),
]
ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((5,), np.float16)}


def write(path: Path, entries=ENTRIES, big_endian: bool = False, alignment: int = 32) -> bytes:
    """Write the sample arrays; return the header's bytes."""
    order = ">" if big_endian else "<"
    ids = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
    specs = [TensorSpec(n, a.shape, ids[a.dtype], a.nbytes) for n, a in ARRAYS.items()]
    header = build_header(entries, specs, alignment=alignment, big_endian=big_endian)
    data = bytearray(header.file_size)
    data[: len(header.data)] = header.data
    for array, offset in zip(ARRAYS.values(), header.offsets, strict=True):
        data[offset : offset + array.nbytes] = array.astype(
            array.dtype.newbyteorder(order)
        ).tobytes()
    path.write_bytes(data)
    return header.data


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("alignment", [32, 64])
def test_round_trip(tmp_path: Path, big_endian: bool, alignment: int) -> None:
    write(tmp_path / "m.gguf", big_endian=big_endian, alignment=alignment)
    found = open_gguf(tmp_path / "m.gguf")
    assert (found.version, found.big_endian, found.alignment) == (3, big_endian, alignment)
    for entry in ENTRIES:
        kept = found.entries[entry.key]
        assert (kept.type, kept.items) == (entry.type, entry.items)
        if entry.type == ValueType.ARRAY:
            assert list(kept.value) == list(entry.value)
        elif entry.type == ValueType.F32:
            assert kept.value == np.float32(entry.value)
        else:
            assert kept.value == entry.value and type(kept.value) is type(entry.value)
    for name, array in ARRAYS.items():
        assert found.tensors[name].shape == array.shape
        np.testing.assert_array_equal(found.array(name), array)


def test_the_gguf_package_reads_our_header_and_writes_the_same(tmp_path: Path) -> None:
    plain = [e for e in ENTRIES if e.key.startswith(("general", "llama", "tokenizer"))]
    write(tmp_path / "ours.gguf", plain)
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("llama.block_count", 2**32 - 1)
    writer.add_float32("llama.rope.freq_base", 1e6)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "é", "", "x" * 700])
    writer.add_array("tokenizer.ggml.token_type", [1, -2, 3])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1000.0])
    for name, array in ARRAYS.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    assert [t.name for t in reader.tensors] == list(ARRAYS)


def test_version_2_is_read_and_version_1_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.write_bytes(raw)
    assert open_gguf(path).version == 2
    raw[4] = 1
    path.write_bytes(raw)
    with pytest.raises(UnsupportedError, match="version 1"):
        open_gguf(path)


def test_real_vocabularies_equal_the_gguf_package(data_dir: Path) -> None:
    path = data_dir / "vocab" / "ggml-vocab-llama-spm.gguf"
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert {k for k in theirs.fields if not k.startswith("GGUF.")} == set(ours.entries)
    for key, entry in ours.entries.items():
        contents = theirs.fields[key].contents()
        assert (
            list(entry.value) == contents
            if entry.type == ValueType.ARRAY
            else entry.value == contents
        )


@pytest.mark.parametrize(
    ("offset", "code", "value", "match"),
    [
        (8, "<Q", 2**60, "claims"),
        (16, "<Q", 2**60, "claims"),
        (24, "<Q", 2**40, "metadata key"),
        (24, "<Q", 70000, "metadata key"),
    ],
)
def test_absurd_counts(tmp_path: Path, offset: int, code: str, value: int, match: str) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    raw = bytearray(path.read_bytes())
    struct.pack_into(code, raw, offset, value)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=match):
        open_gguf(path)


@pytest.mark.parametrize("name", ["tokenizer.ggml.tokens", "tokenizer.ggml.scores"])
def test_absurd_array_counts(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    raw = bytearray(path.read_bytes())
    at = raw.index(name.encode()) + len(name) + 8
    for count in (2**63, 2**30, len(raw)):
        struct.pack_into("<Q", raw, at, count)
        path.write_bytes(raw)
        with pytest.raises(FormatError, match="claims"):
            open_gguf(path)


def test_truncation_and_overlap(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    header = write(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(header) + 40])
    with pytest.raises(FormatError, match="truncated"):
        open_gguf(path)
    specs = [TensorSpec("a", (8,), 0, 32), TensorSpec("b", (8,), 0, 32)]
    built = bytearray(build_header([], specs).data)
    assert built.count(struct.pack("<Q", 32)) == 1
    at = built.index(struct.pack("<Q", 32))
    struct.pack_into("<Q", built, at, 0)
    path.write_bytes(bytes(built) + bytes(64))
    with pytest.raises(FormatError, match="overlap"):
        open_gguf(path)


def test_nested_arrays_and_unknown_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    struct.pack_into("<I", raw, at + 4, 9)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="array of arrays"):
        open_gguf(path)
    struct.pack_into("<I", raw, at, 77)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="value type 77"):
        open_gguf(path)


@pytest.mark.parametrize(
    "entries",
    [
        [u32("a", 1), u32("a", 2)],
        [KeyValue("a", ValueType.U32, -1)],
        [KeyValue("a", ValueType.ARRAY, [300], ValueType.U8)],
        [KeyValue("a", ValueType.ARRAY, [1])],
    ],
)
def test_writer_refuses_bad_metadata(entries: list[KeyValue]) -> None:
    with pytest.raises(FormatError, match="'a'"):
        build_header(entries, [])


def test_writer_refuses_bad_tensors() -> None:
    for spec in (TensorSpec("n" * 64, (1,), 0, 4), TensorSpec("n", (1,) * 5, 0, 4)):
        with pytest.raises(FormatError, match="GGUF"):
            build_header([], [spec])
    with pytest.raises(FormatError, match="twice"):
        build_header([], [TensorSpec("n", (1,), 0, 4)] * 2)
    with pytest.raises(FormatError, match="power of two"):
        build_header([], [], alignment=48)


def split_set(folder: Path, count: int = 2) -> list[Path]:
    """Write a split model of one tensor per file."""
    paths = []
    for number in range(count):
        entries = [
            KeyValue("split.no", ValueType.U16, number),
            KeyValue("split.count", ValueType.U16, count),
            KeyValue("split.tensors.count", ValueType.I32, count),
        ]
        header = build_header(entries, [TensorSpec(f"t{number}", (8,), 0, 32)])
        paths.append(folder / f"m-{number + 1:05d}-of-{count:05d}.gguf")
        paths[-1].write_bytes(header.data + np.full(8, number, np.float32).tobytes())
    return paths


def test_split_sets(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    found = open_gguf(paths[1])
    assert list(found.tensors) == ["t0", "t1"] and found.paths == tuple(paths)
    assert found.array("t1")[0] == 1.0
    assert list(open_gguf(paths[1], follow_splits=False).tensors) == ["t1"]
    first, second = (p.read_bytes() for p in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    with pytest.raises(FormatError, match="own names"):
        open_gguf(paths[0])
    paths[1].unlink()
    with pytest.raises(FormatError, match="lacks m-00002-of-00002"):
        open_gguf(paths[0])


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.gguf"
    size = len(write(path))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, size - 9))
        value = data.draw(st.sampled_from([0, 1, 255, 2**31, 2**32 - 1, 2**62, 2**64 - 1]))
        width = data.draw(st.sampled_from([1, 4, 8]))
        raw[at : at + width] = value.to_bytes(8, "little")[:width]
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        found = open_gguf(path)
        for name in found.tensors:
            found.raw(name)
    except MconvError:
        pass
