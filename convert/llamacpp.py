"""llama.cpp as a witness: greedy tokens and their log probabilities, through ``xllamacpp``.

``xllamacpp`` is optional. The model runs in a process of its own, since a native library that
aborts would take ours with it. Keys and values are cached as F32, so that the only differences to
another float32 implementation are orders of summation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import UnsupportedError

_TIMEOUT = 600


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model said: token ids and the natural log of each one's probability."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def have_llamacpp() -> bool:
    """Return whether ``xllamacpp`` is installed."""
    return find_spec("xllamacpp") is not None


def generate(gguf: Path, prompt: Sequence[int], count: int, threads: int = 2) -> Generated:
    """Return the ``count`` most likely tokens after ``prompt``, fewer when the model ends the text.

    Args:
        gguf: the model.
        prompt: token ids, taken as they are.
        count: tokens to generate.
        threads: of the process.

    Raises:
        UnsupportedError: llama.cpp does not load or run the model.
    """
    request = {
        "model": str(gguf.resolve()),
        "prompt": list(prompt),
        "count": count,
        "threads": threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        cwd=gguf.resolve().parent,  # so that a file of the user's folder never shadows a package
        check=False,
    )
    if done.returncode:
        problems = [line for line in done.stderr.splitlines() if " E " in line or "Error" in line]
        why = problems[-1] if problems else f"status {done.returncode}"
        raise UnsupportedError(f"{gguf}: llama.cpp does not run this model: {why}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Generated(tuple(answer["tokens"]), tuple(answer["logprobs"]))


def _serve(request: dict) -> dict[str, list]:
    """Run one request in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = len(request["prompt"]) + request["count"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.warmup = False
    params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    answer = xllamacpp.Server(params).handle_completions(
        {
            "prompt": request["prompt"],
            "n_predict": request["count"],
            "temperature": 0,
            "logprobs": 1,
            "cache_prompt": False,
        }
    )
    said = answer["choices"][0]["logprobs"]["content"]
    return {"tokens": [t["id"] for t in said], "logprobs": [t["logprob"] for t in said]}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_serve(json.load(sys.stdin))) + "\n")
