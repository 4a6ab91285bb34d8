"""Perplexity of weights in any file, under the trained model's own arithmetic.

The same forward pass runs on the weights that a file really holds, dequantized, so what differs is
the file and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ..batch import IGNORE
from ..data import TokenData
from ..engine import token_loss
from ..init import load_weights, open_weights
from ..model import Decoder
from ..settings import RunConfig
from ..settings.model import ModelConfig
from ..text.source import open_on_all


def decoder_of(path: Path, config: ModelConfig) -> Decoder:
    """Return the whole model with the weights of any checkpoint, GGUF included, in float32.

    Raises:
        MconvError: the weights cannot be read or do not fit.
    """
    model = Decoder(config).to(torch.float32)
    load_weights([model], open_weights(path, config))
    return model.eval()


def perplexities(config: RunConfig, sources: Mapping[str, Path]) -> dict[str, float]:
    """Return the perplexity of each source on the validation data, or else the training data.

    Args:
        config: of the run; ``eval.batches`` batches of ``train.batch`` rows are taken.
        sources: checkpoints by name.
    """
    rows = open_on_all(config, config.eval.tokens)
    count = max(1, config.eval.batches)
    return {
        name: _perplexity(decoder_of(path, config.model), rows, config.train.batch, count)
        for name, path in sources.items()
    }


@torch.no_grad()
def _perplexity(model: Decoder, data: TokenData, batch: int, count: int) -> float:
    total, labels = 0.0, 0
    for number in range(min(count, -(-data.samples // batch))):
        rows = data.in_order(number * batch, batch)
        logits = model(rows.inputs, rows.positions, rows.documents)
        total += float(token_loss(logits, rows.labels, 1))
        labels += int((rows.labels != IGNORE).sum())
    return math.exp(total / max(1, labels))
