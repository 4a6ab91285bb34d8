"""The order of the data: a permutation, the same for every number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mconv.errors import ConfigError, FormatError
from mconv.trainer.data import TokenData, open_tokens, permuted, write_tokens
from mconv.trainer.demo import documents
from mconv.trainer.tokenizer import encode_documents, load_tokenizer, train_tokenizer


@given(size=st.integers(1, 300), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_order_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(i, size, (seed, epoch)) for i in range(size)) == list(range(size))


def test_order_changes_with_epoch_and_seed() -> None:
    orders = {tuple(permuted(i, 50, key) for i in range(50)) for key in [(0, 0), (0, 1), (1, 0)]}
    assert len(orders) == 3


@given(ranks=st.sampled_from([1, 2, 3, 4, 6]), step=st.integers(0, 20))
def test_ranks_share_the_batch(ranks: int, step: int) -> None:
    data = TokenData(np.arange(200, dtype=np.uint16), seq_len=7, seed=1)
    parts = [data.batch(step, 12, rank, ranks) for rank in range(ranks)]
    np.testing.assert_array_equal(np.concatenate(parts), data.batch(step, 12))


def test_an_epoch_shows_every_token_once() -> None:
    data = TokenData(np.arange(64 + 1, dtype=np.uint16), seq_len=8, seed=0)
    rows = data.batch(0, 8)
    assert sorted(rows[:, :-1].ravel()) == list(range(64))
    np.testing.assert_array_equal(rows[:, 1:], rows[:, :-1] + 1)


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_token_files(tmp_path: Path, largest: int, dtype: type) -> None:
    path = tmp_path / "tokens.npy"
    write_tokens(path, np.array([5, 1, largest]))
    data = open_tokens(path, 2, 0, largest + 1)
    assert data.tokens.dtype == dtype
    assert data.batch(0, 1).tolist() == [[5, 1, largest]]
    with pytest.raises(ConfigError, match="beyond model"):
        open_tokens(path, 2, 0, largest)
    with pytest.raises(ConfigError, match="less than one sample"):
        open_tokens(path, 3, 0, largest + 1)


def test_what_is_no_token_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.zeros((2, 2), np.float32))
    with pytest.raises(FormatError, match="not a row of uint16 or uint32"):
        open_tokens(path, 1, 0, 10)
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be read as a token file"):
        open_tokens(path, 1, 0, 10)


def test_tokenizer_loses_nothing_and_is_reproducible(tmp_path: Path) -> None:
    texts = documents()
    train_tokenizer(texts, tmp_path / "a", 400)
    train_tokenizer(texts, tmp_path / "b", 400)
    first, second = ((tmp_path / n / "tokenizer.model").read_bytes() for n in "ab")
    assert first == second
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.vocab_size() == 400
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    for text in [*texts, "  two  blanks\nand a line, Zürich 12 \N{SNOWMAN}"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = encode_documents(texts, tmp_path / "a")
    assert (ids == 1).sum() == (ids == 2).sum() == len(texts)
    with pytest.raises(ConfigError, match="use fewer"):
        train_tokenizer(texts[:1], tmp_path / "c", 5000)
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
