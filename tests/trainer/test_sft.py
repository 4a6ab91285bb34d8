"""Fine-tuning on conversations from end to end: text in, adapter, importance matrix, GGUF out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mconv.convert.imatrix import read_imatrix  # noqa: E402
from mconv.convert.quantize import QuantizeOptions  # noqa: E402
from mconv.convert.to_gguf import to_gguf  # noqa: E402
from mconv.shardio import open_checkpoint  # noqa: E402
from mconv.trainer.batch import IGNORE  # noqa: E402
from mconv.trainer.delivery.demo import documents  # noqa: E402
from mconv.trainer.loop import train  # noqa: E402
from mconv.trainer.mesh import build_meshes, process_group  # noqa: E402
from mconv.trainer.metrics import read_evaluations, read_metrics  # noqa: E402
from mconv.trainer.settings import RunConfig, load_config  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402
from mconv.trainer.settings.model import ModelConfig  # noqa: E402
from mconv.trainer.settings.sections import (  # noqa: E402
    DataConfig,
    EvalConfig,
    ImatrixConfig,
    LoraConfig,
    OptimConfig,
    SaveConfig,
    TrainConfig,
)
from mconv.trainer.text.source import open_data, prepare  # noqa: E402
from mconv.trainer.text.tokenizer import load_tokenizer  # noqa: E402
from mconv.trainer.text.train_tokenizer import train_tokenizer  # noqa: E402

from .ranks import Ranks  # noqa: E402
from .toys import dump_config, plain_model, run_config  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}Q: {{ m.content }}\nA:"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ANSWERS = {"Which lamp?": "The lamp of Marrow Point.", "Who keeps it?": "A keeper, alone."}


def prepared(folder: Path) -> RunConfig:
    """A base model with a tokenizer and a chat template, and conversations."""
    from safetensors.torch import save_file

    base = folder / "base"
    train_tokenizer(documents(), base, 330)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    model = ModelConfig(
        vocab_size=330,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    start = plain_model(replace(run_config(train={"dtype": "float32"}), model=model))
    save_file(start.state_dict(), base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(model.to_hf()))
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ANSWERS.items()
    ]
    for name, count in (("chats", 12), ("valid", 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows * count))
    return RunConfig(
        model=replace(model, init_from=base),
        train=TrainConfig(steps=30, seq_len=64, batch=4, micro_batch=1, threads=1, device="cpu"),
        optim=OptimConfig(lr=2e-2, weight_decay=0.0),
        data=DataConfig(tokens=folder / "chats.jsonl", tokenizer=base),
        lora=LoraConfig(rank=8, targets=("q_proj", "v_proj", "up_proj", "down_proj"), dropout=0.05),
        eval=EvalConfig(
            every=15, batches=0, tokens=folder / "valid.jsonl", prompt="x", sample_tokens=4
        ),
        imatrix=ImatrixConfig(at_end=True, batches=2, tokens=folder / "valid.jsonl"),
        save=SaveConfig(folder=folder / "run"),
    )


def tuned(rank: int, world_size: int, store: Path, config: RunConfig) -> float:
    with process_group(rank, world_size, store):
        run = train(config, build_meshes(resolve(config, world_size), "cpu"))
        return float(sum(p.sum().item() for p in run.state.parts[0].parameters()))


def test_only_answers_are_learned(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    prepare(config.data, 64, tmp_path / "run")
    data = open_data(config.data, 64, 0, 330, tmp_path / "run")
    tokenizer = load_tokenizer(config.data.tokenizer)
    rows = data.in_order(0, data.samples)
    assert data.packs is not None  # whole conversations share a sample
    assert rows.documents is not None
    said = tokenizer.decode(rows.labels[rows.labels != IGNORE].tolist())
    assert all(said.count(answer) == 12 for answer in ANSWERS.values())
    assert len(said) == 12 * sum(len(f" {answer}") for answer in ANSWERS.values()) - 1
    assert not any(question in said for question in ANSWERS)
    assert int((rows.labels == tokenizer.eos).sum()) == 24


def test_conversations_to_gguf(ranks: Ranks, tmp_path: Path) -> None:
    config = prepared(tmp_path)
    ranks(tuned, 2, config)
    run = tmp_path / "run"
    losses = [m.loss for m in read_metrics(run)]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.3  # embedding and head are random and frozen
    first, last = read_evaluations(run)
    assert (first.step, last.step) == (15, 30)
    assert last.loss is not None
    assert first.loss is not None
    assert last.loss < first.loss
    assert last.prompt == "x"

    weights = open_checkpoint(tmp_path / "base", adapter=run / "adapter").weights
    start = open_checkpoint(tmp_path / "base").weights
    changed = {n for n, t in weights.items() if not np.array_equal(t.read(), start[n].read())}
    assert len(changed) == 2 * 4
    assert all(n.split(".")[-2] in config.lora.targets for n in changed)

    matrix = read_imatrix(run / "imatrix.gguf")
    assert len(matrix.entries) == 2 * 7
    assert matrix.datasets == ("valid.jsonl",)
    ckpt = open_checkpoint(tmp_path / "base", adapter=run / "adapter")
    made = to_gguf(
        ckpt,
        tmp_path / "tuned.gguf",
        "iq4_nl",
        quantization=QuantizeOptions(imatrix=run / "imatrix.gguf"),
    )
    assert made.nbytes == (tmp_path / "tuned.gguf").stat().st_size


def test_a_run_file_says_it_all(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config, tmp_path))
    assert load_config(path) == config
