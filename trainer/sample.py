"""Text from a model: greedy decoding, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .model import Decoder


@torch.no_grad()
def greedy(
    model: Decoder, prompt: Sequence[int], count: int, stop: int | None = None
) -> tuple[list[int], list[float]]:
    """Return up to ``count`` most likely tokens after ``prompt`` and their log probabilities.

    ``stop`` ends the text and is not returned.
    """
    ids, logprobs = list(prompt), []
    for _ in range(count):
        scores = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        token = int(scores.argmax())
        if token == stop:
            break
        ids.append(token)
        logprobs.append(float(scores[token]))
    return ids[len(prompt) :], logprobs
