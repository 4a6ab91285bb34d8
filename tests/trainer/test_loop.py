"""Sharded training equals the plain loop: loss, gradient norm and the final weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mconv.errors import ConfigError, TrainError  # noqa: E402
from mconv.shardio import open_checkpoint  # noqa: E402
from mconv.trainer.checkpoint import step_folder  # noqa: E402
from mconv.trainer.delivery.demo import documents  # noqa: E402
from mconv.trainer.delivery.proof import load_model  # noqa: E402
from mconv.trainer.init import materialize  # noqa: E402
from mconv.trainer.launch import launch  # noqa: E402
from mconv.trainer.metrics import read_metrics  # noqa: E402
from mconv.trainer.model import Decoder  # noqa: E402
from mconv.trainer.optim import rate  # noqa: E402
from mconv.trainer.settings import RunConfig  # noqa: E402
from mconv.trainer.settings.model import ModelConfig  # noqa: E402
from mconv.trainer.settings.sections import (  # noqa: E402
    DataConfig,
    OptimConfig,
    SaveConfig,
    ScheduleConfig,
    TrainConfig,
)
from mconv.trainer.text.source import open_tokens  # noqa: E402
from mconv.trainer.text.token_file import write_tokens  # noqa: E402
from mconv.trainer.text.tokenizer import encode_documents  # noqa: E402
from mconv.trainer.text.train_tokenizer import train_tokenizer  # noqa: E402

from .toys import dump_config  # noqa: E402


def prepared(folder: Path) -> RunConfig:
    config = RunConfig(
        model=ModelConfig(
            vocab_size=331,  # divides by nothing
            hidden_size=36,
            intermediate_size=50,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        train=TrainConfig(steps=4, seq_len=32, batch=4, seed=5, threads=1),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup=2),
        data=DataConfig(tokens=folder / "tokens.npy", tokenizer=folder / "tokenizer"),
        save=SaveConfig(folder=folder / "run"),
    )
    config.save.folder.mkdir()
    train_tokenizer(documents(), config.data.tokenizer, config.model.vocab_size)
    write_tokens(config.data.tokens, encode_documents(documents(), config.data.tokenizer))
    return config


def plain_loop(config: RunConfig) -> tuple[list[tuple[float, float]], Decoder]:
    """The same training, written down without any of the trainer's loop, loss or optimizer."""
    train = config.train
    with torch.device("meta"):
        model = Decoder(config.model)
    materialize(model, train.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        weight_decay=config.optim.weight_decay,
        betas=(config.optim.beta1, config.optim.beta2),
    )
    data = open_tokens(config.data.tokens, train.seq_len, train.seed, config.model.vocab_size)
    history = []
    for step in range(train.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * rate(step, train.steps, config.schedule)
        batch = data.batch(step, train.batch)
        logits = model(batch.inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history, model


def test_two_ranks_equal_the_plain_loop(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    run = tmp_path / "run.toml"
    run.write_text(dump_config(config, tmp_path), encoding="utf-8")
    launch(run, config.save.folder, 2)
    history, model = plain_loop(config)
    metrics = read_metrics(config.save.folder)
    assert [m.step for m in metrics] == [1, 2, 3, 4]
    np.testing.assert_allclose([(m.loss, m.grad_norm) for m in metrics], history, rtol=1e-5)

    folder = step_folder(config.save.folder, 4)
    trained, expected = load_model(folder).state_dict(), model.state_dict()
    assert set(trained) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(trained[name], values, atol=2e-6, rtol=1e-5)
    assert not [p for p in config.save.folder.iterdir() if p.name.endswith(".tmp")]

    ckpt = open_checkpoint(folder)
    assert ckpt.step == 4
    assert set(ckpt.optimizer) >= {"exp_avg", "exp_avg_sq"}
    weights = {**ckpt.weights, **{a: ckpt.weights[o] for a, o in ckpt.tied.items()}}
    assert set(weights) == set(trained)
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensor.read(), trained[name].numpy())


def test_a_failing_rank_ends_the_run_with_its_message(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    run = tmp_path / "run.toml"
    shorter = replace(config, model=replace(config.model, vocab_size=310))
    run.write_text(dump_config(shorter, tmp_path), encoding="utf-8")
    with pytest.raises(TrainError, match=r"rank 0 .*token \d+ is beyond model\.vocab_size=310"):
        launch(run, config.save.folder, 1)
    with pytest.raises(ConfigError, match="cannot train with 0 processes"):
        launch(run, config.save.folder, 0)
