"""Proofs that an exported model is the trained one.

Each proof has an independent witness: ``mconv.diff`` compares every tensor of the merged model with
the shards, torch's own checkpoint reader loads the shards without our code, every GGUF tensor is
read back, and llama.cpp (where installed) says the same as the torch model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...convert.diff import diff
from ...convert.llamacpp import generate
from ...convert.verify import verify_gguf
from ...errors import ConfigError, MconvError
from ...shardio import open_checkpoint
from ..settings.model import ModelConfig

if TYPE_CHECKING:
    from ..model import Decoder

_TOLERANCE = 1e-3  # nats
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim, whether it holds, and the figures."""

    claim: str
    ok: bool
    detail: str


def merged_equals_shards(merged: Path, shards: Path) -> Proof:
    """Compare the merged model with the sharded checkpoint, tensor by tensor."""
    report = diff(shards, merged)
    equal = sum(d.equal for d in report.tensors)
    detail = f"{equal} of {len(report.tensors)} tensors equal bit for bit"
    return Proof("merged = shards (mconv diff)", report.equal, detail)


def load_model(folder: Path) -> Decoder:
    """Return the model of a checkpoint on one process, read by torch's own reader of its shards.

    Raises:
        ConfigError: no ``config.json``, or not of a model that the trainer has.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    from ..model import Decoder

    path = folder / "config.json"
    try:
        config = ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    model = Decoder(config)
    state = {k: v for k, v in model.state_dict().items() if k != _HEAD or not model.tied}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        reader = HuggingFaceStorageReader(str(folder))
        state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    model.tie()
    return model.eval()


def merged_equals_torch(merged: Path, model: Decoder) -> Proof:
    """Compare the merged model with what torch's own reader made of the shards."""
    weights = open_checkpoint(merged).weights
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop(_HEAD, None)
    equal = sum(
        name in weights and np.array_equal(weights[name].read(), values)
        for name, values in state.items()
    )
    ok = equal == len(state) == len(weights)
    detail = f"{equal} of {len(state)} tensors equal bit for bit"
    return Proof("merged = torch.distributed.checkpoint's own reader", ok, detail)


def gguf_equals_model(gguf: Path, merged: Path) -> Proof:
    """Read every tensor of a GGUF file back: exact as floats, within bounds when quantized."""
    check = verify_gguf(gguf, merged)
    exact = sum(t.exact for t in check.tensors)
    errors = {name: error for name, error in check.worst().items() if error}
    figures = "".join(f", {name} off by at most {error:.2%} RMS" for name, error in errors.items())
    detail = f"{exact} of {len(check.tensors)} tensors exact{figures}"
    return Proof(f"{gguf.name} read back", check.ok, detail)


def llamacpp_says_the_same(
    gguf: Path,
    prompt: Sequence[int],
    tokens: Sequence[int],
    logprobs: Sequence[float],
    count: int,
    stop: int,
) -> Proof:
    """Compare what llama.cpp says after ``prompt`` with what torch said.

    Args:
        gguf: the model, as F32.
        prompt: token ids.
        tokens, logprobs: torch's greedy tokens and their log probabilities.
        count: tokens to ask for.
        stop: the token that ends a text; not in ``tokens``.
    """
    claim = f"llama.cpp runs {gguf.name} as torch does"
    try:
        said = generate(gguf, prompt, count)
    except MconvError as error:
        return Proof(claim, False, str(error))
    theirs = [t for t in said.tokens if t != stop]
    if theirs != list(tokens):
        pairs = zip(theirs, tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(tokens)))
        return Proof(claim, False, f"only the first {same} of {len(tokens)} greedy tokens agree")
    off = max((abs(a - b) for a, b in zip(said.logprobs, logprobs, strict=False)), default=0.0)
    detail = f"{len(tokens)} greedy tokens equal, log probabilities within {off:.0e}"
    return Proof(claim, off <= _TOLERANCE, detail)
