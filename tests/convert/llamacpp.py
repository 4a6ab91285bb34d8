"""Run llama.cpp (through xllamacpp) on a GGUF: tokenize text, continue a prompt."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

#: One that is whole text; nothing is told of others.
PLAIN_TOKEN = 300


class LlamaCpp:
    """A loaded model. Loading fails with an exception when llama.cpp refuses the file."""

    def __init__(self, path: Path, *, embedding: bool = False) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 256
        params.n_parallel = 1
        params.warmup = False
        params.verbosity = 0
        params.cpuparams.n_threads = 2
        params.port = 0
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.embedding = embedding
        if embedding:
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        self._server = xllamacpp.Server(params)

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around it."""
        body = {"content": text, "add_special": False, "parse_special": False}
        return list(self._post("/tokenize", body)["tokens"])

    def log_probabilities(self, prompt: list[int], size: int) -> np.ndarray:
        """Return the logarithms of what each of ``size`` tokens has as probability to follow."""
        body = {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": size,
            "logit_bias": [[PLAIN_TOKEN, 1e4]],  # changes what is chosen, not what is told
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": False,
        }
        [first] = self._post("/completion", body)["completion_probabilities"]
        out = np.full(size, np.nan)
        for entry in first["top_logprobs"]:
            out[entry["id"]] = entry["logprob"]
        return out

    def embeddings(self, tokens: list[int]) -> np.ndarray:
        """Return the vectors of all tokens of a text; the model was opened with ``embedding``."""
        [answer] = self._post("/embedding", {"content": tokens, "embd_normalize": -1})
        return np.array(answer["embedding"])

    def greedy(self, prompt: list[int], count: int, banned: range) -> list[int]:
        """Return the most likely continuation, token by token, without ``banned`` ids."""
        body = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0.0,
            "top_k": 1,
            "return_tokens": True,
            "cache_prompt": False,
            "logit_bias": [[token, False] for token in banned],
        }
        return list(self._post("/completion", body)["tokens"])
