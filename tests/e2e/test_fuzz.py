"""A few hundred mutants of ``benchmarks/fuzz.py`` over all fixtures: refused with an MconvError or
read, in little time and memory, nothing written. The long run is for the command line.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent / "convert"))
import tiny
from fuzz import examine, try_one
from fuzz_cases import Case, find_cases, made_cases
from harness import TRAINED, copy
from mutations import MUTATIONS, files_of

MUTANTS, PARTS = 320, 4


@pytest.fixture
def bpe(data_dir: Path, tmp_path: Path) -> Case:
    """The trained model with a tokenizer.json of as many tokens."""
    folder = copy(TRAINED / "hf", tmp_path / "bpe")
    vocab = data_dir / "vocab" / "ggml-vocab-llama-bpe.gguf"
    assert tiny.save_bpe(vocab, folder, 632) == 640
    (folder / "tokenizer.model").unlink()
    return Case(folder, gguf=True)


def test_damaged_configs_and_tokenizers(bpe: Case, tmp_path: Path) -> None:
    assert examine(bpe.folder, bpe, tmp_path / "out") == "read"
    (tmp_path / "work").mkdir()
    for seed in range(150):
        _, finding = try_one(seed, [bpe, Case(TRAINED / "hf", gguf=True)], tmp_path / "work", 10)
        assert finding is None, finding


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Checkpoints of the formats that no fixture has."""
    return made_cases(tmp_path_factory.mktemp("made"))


def test_made_checkpoints_are_read(made: list[Case], tmp_path: Path) -> None:
    outcomes = {c.folder.name: examine(c.folder, c, tmp_path / "out") for c in made}
    assert len(outcomes) > 12
    refused = [name for name, outcome in outcomes.items() if outcome == "refused"]
    assert not refused


@pytest.mark.parametrize("part", range(PARTS))
def test_mutants_are_refused_or_read(
    fixtures_dir: Path, made: list[Case], tmp_path: Path, part: int
) -> None:
    cases = [*find_cases(fixtures_dir), *made]
    assert len(cases) > 85
    work = tmp_path / "work"
    work.mkdir()
    outcomes = []
    for seed in range(part, MUTANTS, PARTS):
        outcome, finding = try_one(seed, cases, work, seconds=10)
        assert finding is None, finding
        outcomes.append(outcome)
    assert {"refused", "read"} <= set(outcomes)


def test_pristine_checkpoints_are_read(fixtures_dir: Path, tmp_path: Path) -> None:
    """Otherwise the mutants would prove nothing."""
    cases = find_cases(fixtures_dir)
    outcomes = [examine(case.folder, case, tmp_path / "out") for case in cases]
    assert outcomes.count("read") > 0.9 * len(cases)


@pytest.mark.parametrize("mutation", dict.fromkeys(MUTATIONS), ids=lambda f: f.__name__)
def test_mutations_change_something_and_repeat(tmp_path: Path, mutation: object) -> None:
    def content(folder: Path) -> dict[str, object]:
        return {
            str(p.relative_to(folder)): p.read_bytes() if p.is_file() else p.is_symlink()
            for p in sorted(folder.rglob("*"))
        }

    assert callable(mutation)
    changed = 0
    for seed in range(8):
        made = []
        for k in range(2):
            folder = copy(TRAINED / "zero3", tmp_path / f"{seed}-{k}")
            mutation(folder, random.Random(seed), files_of(TRAINED / "megatron"))
            made.append(content(folder))
        assert made[0] == made[1]
        changed += made[0] != content(TRAINED / "zero3")
    assert changed >= 5
