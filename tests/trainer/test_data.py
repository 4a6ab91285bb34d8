"""The order of the data and how tokens become samples: the same for every number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from mconv.errors import ConfigError, FormatError  # noqa: E402
from mconv.trainer.batch import IGNORE, Batch  # noqa: E402
from mconv.trainer.data import TokenData, permuted  # noqa: E402
from mconv.trainer.settings.sections import DataConfig  # noqa: E402
from mconv.trainer.text.pack import pack  # noqa: E402
from mconv.trainer.text.source import (  # noqa: E402
    open_data,
    open_on_all,
    open_tokens,
    prepare,
    token_path,
)
from mconv.trainer.text.token_file import (  # noqa: E402
    TokenFile,
    open_token_file,
    write_token_folder,
    write_tokens,
)

from .toys import run_config  # noqa: E402

Lengths = st.lists(st.integers(1, 25), min_size=1, max_size=30)


def filed(lengths: list[int], learned: bool = False) -> TokenFile:
    """Documents of these lengths; token i is i, so that every token is known by itself."""
    total = sum(lengths)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64)
    marks = (np.arange(total) % 3 == 0).astype(np.uint8) if learned else None
    return TokenFile(Path("t.npy"), np.arange(total, dtype=np.uint16), starts, marks)


def equal(a: Batch, b: Batch) -> bool:
    parts = [(getattr(a, n), getattr(b, n)) for n in ("inputs", "labels", "positions", "documents")]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in parts)


def joined(parts: list[Batch]) -> Batch:
    documents = None
    if parts[0].documents is not None:
        documents = torch.cat([p.documents for p in parts])
    return Batch(
        torch.cat([p.inputs for p in parts]),
        torch.cat([p.labels for p in parts]),
        torch.cat([p.positions for p in parts]),
        documents,
    )


@given(size=st.integers(1, 300), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_order_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(size), size, (seed, epoch))) == list(range(size))


def test_order_changes_with_epoch_and_seed_and_never_between_machines() -> None:
    orders = [permuted(np.arange(50), 50, key).tolist() for key in [(0, 0), (0, 1), (1, 0)]]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0][:8] == [38, 31, 28, 32, 48, 35, 7, 2]
    assert permuted(np.array([10**9]), 1 << 40, (3, 1)).tolist() == [946069087977]


@given(
    lengths=Lengths,
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
    step=st.integers(0, 20),
    fit=st.booleans(),
)
def test_ranks_share_the_batch(lengths: list[int], ranks: int, step: int, fit: bool) -> None:
    file = filed([*lengths, 9], learned=True)
    packs = pack(file.starts, len(file.tokens), 8) if fit else None
    data = TokenData(file, seq_len=8, seed=1, packs=packs)
    parts = [data.batch(step, 12, rank, ranks) for rank in range(ranks)]
    assert equal(joined(parts), data.batch(step, 12))


@given(lengths=Lengths, seq_len=st.integers(2, 16), fit=st.booleans())
def test_an_epoch_predicts_every_token_of_every_document_once(
    lengths: list[int], seq_len: int, fit: bool
) -> None:
    file = filed([*lengths, 2])
    packs = pack(file.starts, len(file.tokens), seq_len) if fit else None
    data = TokenData(file, seq_len, seed=4, packs=packs)
    rows = data.batch(0, data.samples)
    counted = rows.labels != IGNORE
    expected = sorted(set(range(len(file.tokens))) - set(file.starts.tolist()))
    assert sorted(rows.labels[counted].tolist()) == expected
    assert torch.equal(rows.labels[counted], rows.inputs[counted] + 1)
    owner = torch.from_numpy(np.searchsorted(file.starts, np.arange(len(file.tokens)), "right"))
    for row in range(data.samples):
        own = owner[rows.inputs[row][counted[row]]]
        documents = rows.documents[row][counted[row]]
        same = own[:, None] == own
        if not fit:  # two pieces of one document may share a packed sample, as strangers
            assert torch.equal(documents[:, None] == documents, same)
        assert not ((documents[:, None] == documents) & ~same).any()
    for row in range(data.samples):
        previous = torch.cat((torch.tensor([-1]), rows.documents[row][:-1]))
        anew = rows.documents[row] != previous
        assert torch.equal(anew, rows.positions[row] == 0)
        assert (rows.positions[row].diff()[~anew[1:]] == 1).all()


@given(lengths=Lengths, seq_len=st.integers(1, 20))
def test_packing_is_first_fit_decreasing(lengths: list[int], seq_len: int) -> None:
    file = filed(lengths)
    pieces = []
    for start, length in zip(file.starts.tolist(), lengths, strict=True):
        size = length - 1
        pieces += [(start + at, min(seq_len, size - at)) for at in range(0, size, seq_len)]
    rooms: list[int] = []
    expected: list[list[tuple[int, int]]] = []
    for piece in sorted(pieces, key=lambda p: -p[1]):
        fits = [i for i, room in enumerate(rooms) if room >= piece[1]]
        if not fits:
            rooms.append(seq_len)
            expected.append([])
        at = fits[0] if fits else len(rooms) - 1
        rooms[at] -= piece[1]
        expected[at].append(piece)
    table = pack(file.starts, len(file.tokens), seq_len).tolist()
    assert table == [[i, *piece] for i, packed in enumerate(expected) for piece in packed]


def test_what_is_not_learned_has_no_label() -> None:
    data = TokenData(filed([7, 6], learned=True), 16, 0)
    row = data.in_order(0, 1)
    learned = [(2, 3), (5, 6), (8, 9), (11, 12)]
    expected = [dict(learned).get(place, IGNORE) for place in range(16)]
    assert row.labels[0].tolist() == expected
    plain = TokenData(filed([7, 6]), 12, 0, separate=False).in_order(0, 1)
    assert plain.labels[0].tolist() == list(range(1, 13))
    assert plain.documents is None


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_token_files(tmp_path: Path, largest: int, dtype: type) -> None:
    path = tmp_path / "tokens.npy"
    write_tokens(path, np.array([5, 1, largest]))
    data = open_tokens(path, 2, 0, largest + 1)
    assert data.file.tokens.dtype == dtype
    batch = data.batch(0, 1)
    assert (batch.inputs.tolist(), batch.labels.tolist()) == ([[5, 1]], [[1, largest]])
    assert batch.documents is None
    with pytest.raises(ConfigError, match="beyond model"):
        open_tokens(path, 2, 0, largest)
    with pytest.raises(ConfigError, match="less than one sample"):
        open_tokens(path, 3, 0, largest + 1)
    with pytest.raises(ConfigError, match="does not say where documents start"):
        open_tokens(path, 2, 0, largest + 1, packing="first_fit")


def test_folders_of_tokens(tmp_path: Path) -> None:
    rows = [(np.arange(5), None), (np.arange(0), None), (np.arange(3), np.array([0, 1, 1]))]
    about = write_token_folder(tmp_path, iter(rows), 70_000, {"bos": 1})
    file = open_token_file(tmp_path)
    assert about == file.about
    assert (about["tokens"], about["learned"], about["documents"]) == (8, 7, 2)
    assert file.tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert (file.tokens.dtype, file.largest()) == (np.uint32, 4)
    assert file.starts.tolist() == [0, 5]
    assert file.learned.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert np.load(tmp_path / "tokens.npy").tolist() == file.tokens.tolist()
    raw = tmp_path / "raw.bin"
    raw.write_bytes(np.array([3, 1, 2], "<u2").tobytes())
    assert open_token_file(raw).tokens.tolist() == [3, 1, 2]


def test_what_is_no_token_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.zeros((2, 2), np.float32))
    with pytest.raises(FormatError, match="not a row of uint16 or uint32"):
        open_tokens(path, 1, 0, 10)
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be read as a token file"):
        open_tokens(path, 1, 0, 10)
    write_tokens(path, np.arange(4))
    np.save(tmp_path / "tokens.starts.npy", np.array([0, 9]))
    with pytest.raises(FormatError, match="not of this file"):
        open_tokens(path, 1, 0, 10)
    np.save(tmp_path / "tokens.starts.npy", np.array([0, 2]))
    np.save(tmp_path / "tokens.learned.npy", np.ones(3, np.uint8))
    with pytest.raises(FormatError, match="has 3 entries, not 4"):
        open_tokens(path, 1, 0, 10)


def test_a_changed_dataset_has_another_fingerprint() -> None:
    file = filed([2000, 3000], learned=True)
    seen = {TokenData(file, 8, 0).fingerprint()}
    assert TokenData(filed([2000, 3000], learned=True), 8, 0).fingerprint() in seen
    tokens = file.tokens.copy()
    tokens[-1] += 1
    for other in (
        TokenData(file, 8, 1),
        TokenData(file, 9, 0),
        TokenData(file, 8, 0, separate=False),
        TokenData(filed([3000, 2000], learned=True), 8, 0),
        TokenData(filed([2000, 3000]), 8, 0),
        TokenData(TokenFile(Path("t"), tokens, file.starts, file.learned), 8, 0),
        TokenData(file, 8, 0, packs=pack(file.starts, 5000, 8)),
    ):
        assert other.fingerprint() not in seen
        seen.add(other.fingerprint())


def test_a_tokenizer_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    config = run_config("dense", {})
    with pytest.raises(ConfigError, match=r"data.tokenizer=none: no tokenizer.json or"):
        open_on_all(config)


def test_text_is_encoded_once(tmp_path: Path) -> None:
    from mconv.trainer.text.train_tokenizer import train_tokenizer

    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a lamp"}\n{"text": "the sea and a lamp"}\n')
    train_tokenizer(["the sea and a lamp " * 9], tmp_path / "tok", 270)
    config = DataConfig(tokens=text, tokenizer=tmp_path / "tok", packing="first_fit")
    prepare(config, 16, tmp_path / "run")
    made = token_path(config, tmp_path / "run")
    assert made.parent == tmp_path / "run" / "data"
    assert sorted(p.name.split("-")[0] for p in made.parent.iterdir()) == ["packs", "text"]
    data = open_data(config, 16, 0, 270, tmp_path / "run")
    assert isinstance(data.packs, np.memmap)
    assert data.file.about["documents"] == 2
    again = open_data(config, 16, 0, 270, tmp_path / "run")
    assert equal(again.batch(3, 2), data.batch(3, 2))
    train_tokenizer(["the sea and a lamp " * 9], tmp_path / "other", 271)
    with pytest.raises(ConfigError, match="another tokenizer"):
        open_data(replace(config, tokens=made, tokenizer=tmp_path / "other"), 16, 0, 270, tmp_path)
    text.write_text('{"text": "another"}\n')
    assert token_path(config, tmp_path / "run") != made


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_files(tmp_path: Path, dtype: str) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=getattr(np, dtype))
    builder.add_document(torch.tensor([5, 6, 7, 1, 2]), [3, 2])  # two sequences
    builder.add_document(torch.tensor([9, 8]), [2])
    builder.finalize(str(tmp_path / "t.idx"))
    file = open_token_file(tmp_path / "t.bin")
    assert file.tokens.tolist() == [5, 6, 7, 1, 2, 9, 8]
    assert file.starts.tolist() == [0, 5]
    assert open_tokens(tmp_path / "t.bin", 4, 0, 10, packing="first_fit").samples == 2
    data = (tmp_path / "t.idx").read_bytes()
    for damaged, said in (
        (b"MMIDIDY" + data[7:], "not an index"),
        (data[:30], "not an index"),
        (data[:60], "cut off"),
        (data[:17] + b"\x07" + data[18:], "type 7"),
        (data[:34] + b"\x09" + data[35:], "not those of the .bin"),
    ):
        (tmp_path / "t.idx").write_bytes(damaged)
        with pytest.raises(FormatError, match=said):
            open_token_file(tmp_path / "t.bin")
