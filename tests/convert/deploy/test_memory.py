"""The memory plan: exact where it can be, and refusing what cannot fit."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mconv.convert.deploy.memory import MemoryPlan, plan_memory, refuse_what_cannot_fit
from mconv.convert.deploy.model_files import facts_of_gguf, facts_of_hf, tensor_bytes
from mconv.convert.deploy.rpc import Machine, Part, layer_bytes, parse_machine, split_layers
from mconv.convert.gguf import open_gguf
from mconv.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from deployments import CHAT, gguf

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(tmp_path_factory.mktemp("model"))


LOAD = """
import os, sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 2, 0
params.kv_unified = params.warmup = params.fit_params = False
params.verbosity = 10
server = xllamacpp.Server(params)
time.sleep(0.5)  # its log is written by another thread
os._exit(0)  # ending it in order may hang
"""


def test_keys_and_values_are_what_llama_cpp_takes(model: Path) -> None:
    pytest.importorskip("xllamacpp")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(model)], capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", done.stdout + done.stderr)
    if not sizes:
        pytest.skip("this llama.cpp does not say the size of its cache")
    plan = plan_memory(facts_of_gguf(model), 0, context=512, slots=2, replicas=1, limit=None)
    assert round(plan.kv / 2**20, 2) == pytest.approx(sum(map(float, sizes)), abs=0.01)


def test_a_gguf_and_its_folder_have_the_same_plan(model: Path) -> None:
    plans = [
        plan_memory(facts, 1000, context=512, slots=3, replicas=2, limit=None)
        for facts in (facts_of_gguf(model), facts_of_hf(CHAT))
    ]
    assert plans[0] == plans[1]
    assert plans[0].total == 2 * plans[0].replica
    assert tensor_bytes(model) == sum(t.nbytes for t in open_gguf(model).tensors.values())


PLAN = MemoryPlan(
    weights=4 * GIB, kv=4 * GIB, work=GIB, context=8192, slots=4, replicas=2, limit=None
)


@pytest.mark.parametrize(
    ("limit", "help_"),
    [
        (8 * GIB, "4 slots of 6144 tokens would fit"),
        (5 * GIB + GIB // 8, "4 slots of 256 tokens would fit"),
        (5 * GIB + GIB // 16, "one slot of 512 tokens would fit"),
        (5 * GIB, "quantize it further, or spread its layers"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(limit: int, help_: str) -> None:
    with pytest.raises(ConfigError, match=help_) as error:
        refuse_what_cannot_fit(replace(PLAN, limit=limit))
    assert "one replica needs 9.00 GiB" in str(error.value)
    refuse_what_cannot_fit(replace(PLAN, limit=9 * GIB))
    refuse_what_cannot_fit(PLAN)


def test_layers_are_all_tensors_but_the_embedding(model: Path) -> None:
    file = open_gguf(model)
    layers = layer_bytes(file)
    assert len(layers) == 2 + 1
    embedding = file.tensors["token_embd.weight"].nbytes
    tied = "output.weight" not in file.tensors
    assert sum(layers) == tensor_bytes(model) - embedding + tied * embedding


def machines(*memories: int) -> list[Machine]:
    return [Machine(f"m{k}:50052", memory) for k, memory in enumerate(memories)]


def shares(parts: tuple[Part, ...]) -> list[int]:
    return [part.layers for part in parts]


def test_layers_are_shared_by_memory() -> None:
    assert shares(split_layers([10] * 8 + [0], 0, 0, machines(100, 100))) in ([4, 5], [5, 4])
    assert shares(split_layers([10] * 9, 0, 0, machines(30, 60))) == [3, 6]
    assert shares(split_layers([10] * 9, 0, 0, machines(10**6, 0, 10**6))) in ([4, 0, 5], [5, 0, 4])
    assert shares(split_layers([10] * 8 + [5], 10, 3, machines(200, 20))) == [8, 1]


def test_too_little_memory_is_told() -> None:
    with pytest.raises(ConfigError, match=r"the layers need .* and the machines hold"):
        split_layers([GIB] * 9, 0, 0, machines(4 * GIB, 4 * GIB))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.lists(st.integers(1, 600), min_size=1, max_size=5),
    st.integers(0, 20),
)
def test_a_split_holds_and_is_what_llama_cpp_makes_of_it(
    layers: list[int], memories: list[int], kv: int
) -> None:
    try:
        parts = split_layers(layers, kv, 5, machines(*memories))
    except ConfigError:
        return
    assert all(part.nbytes <= part.machine.memory - 5 for part in parts if part.layers)
    counts = [part.layers for part in parts if part.layers]
    assert sum(counts) == len(layers)
    # llama.cpp: the first device whose cumulated share exceeds the layer's
    total, ends = sum(counts), [sum(counts[: k + 1]) for k in range(len(counts))]
    placed = [
        next(d for d, end in enumerate(ends) if end / total > k / total) for k in range(len(layers))
    ]
    assert [placed.count(d) for d in range(len(counts))] == counts


@pytest.mark.parametrize(
    ("text", "address"), [("10.0.0.2", "10.0.0.2:50052"), ("gpu-1.lan:99", "gpu-1.lan:99")]
)
def test_machines(text: str, address: str) -> None:
    assert parse_machine(text, 1).address == address


@pytest.mark.parametrize("text", ["", ":1", "a b", "host:x", "-x"])
def test_bad_machines(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST"):
        parse_machine(text, 1)
