"""Text from a model: greedy decoding, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..model import Decoder

_MULTIPLE = 128  # of the padded length: few lengths to compile, and cut evenly over ranks


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread for a while: on tiny matrices several are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def greedy(
    model: Decoder,
    prompt: Sequence[int],
    count: int,
    stop: int | None = None,
    device: torch.device | str = "cpu",
    padded: bool = False,
) -> tuple[list[int], list[float]]:
    """Return up to ``count`` most likely tokens after ``prompt`` and their log probabilities.

    Args:
        model: whole, or cut over ranks that all call this.
        prompt: token ids.
        count: most tokens to return.
        stop: ends the text and is not returned.
        device: of the model.
        padded: always run one length, which a model that is cut or compiled wants.
    """
    ids, logprobs = list(prompt), []
    length = -(-(len(ids) + count) // _MULTIPLE) * _MULTIPLE
    for _ in range(count):
        fill = [0] * (length - len(ids)) if padded else []
        logits = model(torch.tensor([ids + fill], device=device))
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        scores = logits[0, len(ids) - 1].float().log_softmax(-1)
        best = scores.argmax()
        if dist.is_initialized():
            dist.broadcast(best, 0)  # no rank may stop alone
        token = int(best)
        if token == stop:
            break
        ids.append(token)
        logprobs.append(float(scores[token]))
    return ids[len(prompt) :], logprobs
