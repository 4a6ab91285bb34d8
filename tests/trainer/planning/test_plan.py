"""Plans: exact sizes, the usual rules, and sections that the trainer takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from mconv.cli import cli
from mconv.convert.model_sizes import TYPES, model_sizes
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError
from mconv.trainer.delivery.demo import documents
from mconv.trainer.planning.dryrun import plan_run
from mconv.trainer.planning.plan import Machines, plan_training, train_memory
from mconv.trainer.planning.plan_serving import plan_serving
from mconv.trainer.settings import load_config
from mconv.trainer.settings.degrees import resolve
from mconv.trainer.settings.model import ModelConfig
from mconv.trainer.text.train_tokenizer import train_tokenizer

from ..toys import MODELS, dump_config, run_config

GB = 10**9
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
}
SHAPES = {
    "1B": (2048, 8192, 16, 32, True),
    "8B": (4096, 14336, 32, 32, False),
    "70B": (8192, 28672, 80, 64, False),
    "405B": (16384, 53248, 126, 128, False),
}


def config_file(folder: Path, name: str) -> Path:
    hidden, inner, layers, heads, tied = SHAPES[name]
    config = {
        **LLAMA,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("1B", 1_235_814_400),
        ("8B", 8_030_261_248),
        ("70B", 70_553_706_496),
        ("405B", 405_853_388_800),
    ],
)
def test_published_sizes(tmp_path: Path, name: str, parameters: int) -> None:
    sizes = model_sizes(config_file(tmp_path, name))
    assert sizes.parameters == parameters
    assert sizes.kv_bytes(1) == 2 * 2 * 8 * sizes.head * len(sizes.layers)
    if name == "8B":  # the well-known file has 4.92 GB, metadata included
        assert 4.90 < sizes.gguf["Q4_K_M"] / GB < 4.92


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_checkpoint_and_its_config_say_the_same(tmp_path: Path, model: str) -> None:
    from mconv.trainer.moe import expert_names
    from safetensors.torch import save_file

    from ..toys import plain_model

    config = replace(run_config(model).model, vocab_size=330, hidden_size=32, head_dim=8)
    config = replace(config, intermediate_size=256, moe_intermediate_size=256)
    decoder = plain_model(replace(run_config(model, {"dtype": "float32"}), model=config))
    weights: dict[str, Any] = {}
    for name, tensor in decoder.state_dict().items():
        names = expert_names(config, name)
        parts = zip(names, tensor.unbind(), strict=True) if names else [(name, tensor)]
        weights |= {one: part.clone() for one, part in parts}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    sizes = model_sizes(tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config.to_hf()))
    assert model_sizes(tmp_path / "alone") == model_sizes(tmp_path / "config.json")
    assert model_sizes(tmp_path / "alone").parameters == sizes.parameters
    assert model_sizes(tmp_path / "alone").gguf == sizes.gguf
    assert sizes.parameters == sum(p.numel() for p in decoder.parameters())
    kind = "bpe" if config.model_type.startswith("qwen") else "sentencepiece"
    train_tokenizer(documents(), tmp_path, 330, kind)
    wanted = [t for t in TYPES if t not in ("IQ3_XXS", "IQ2_XS")]  # need an importance matrix
    made = to_gguf(tmp_path, tmp_path / "{type}.gguf", ",".join(wanted), dry_run=True)
    for one in (made, *made.more):
        assert sizes.gguf[one.type] == sum(t.nbytes for t in one.tensors), one.type


@pytest.mark.parametrize(
    ("model", "machines", "expected"),
    [
        ("1B", {"gpus": 1, "memory": 80 * GB}, "one GPU none"),
        ("1B", {"gpus": 8, "memory": 80 * GB}, "DDP none"),
        ("1B", {"gpus": 8, "memory": 24 * GB}, "ZeRO-1 full"),
        ("8B", {"gpus": 8, "memory": 80 * GB}, "ZeRO-2 none"),
        (
            "8B",
            {"gpus": 16, "memory": 80 * GB, "nodes": 2, "fast": False},
            "ZeRO-2 within nodes, copies between them (HSDP) none",
        ),
        ("8B", {"gpus": 8, "memory": 24 * GB}, "TP 4 x ZeRO-3 full"),
        ("8B", {"gpus": 1, "memory": 80 * GB}, "ZeRO-3 with CPU offload none"),
        ("70B", {"gpus": 64, "memory": 80 * GB, "nodes": 8}, "ZeRO-3 full"),
        (
            "70B",
            {"gpus": 64, "memory": 80 * GB, "nodes": 8, "fast": False},
            "TP 2 x PP 8 x ZeRO-3 selective",
        ),
        ("405B", {"gpus": 512, "memory": 80 * GB, "nodes": 64}, "TP 2 x ZeRO-3 full"),
        ("405B", {"gpus": 8, "memory": 80 * GB}, "nothing"),
    ],
)
def test_rules(tmp_path: Path, model: str, machines: dict[str, Any], expected: str) -> None:
    sizes = model_sizes(config_file(tmp_path, model))
    there = Machines(**machines)
    plan = plan_training(sizes, there, 4096)
    assert (f"{plan.name} {plan.recompute}" if plan.fits else "nothing") == expected
    assert plan.memory is not None
    assert plan.fits == (plan.memory.total <= there.usable)
    if not plan.fits:
        return
    config = ModelConfig.from_hf(json.loads((tmp_path / f"{model}.json").read_text()))
    whole = dump_config(replace(run_config(), model=config), tmp_path).split("[parallel]")[0]
    whole = "\n".join(part for part in whole.split("\n\n") if not part.startswith("[train]"))
    file = tmp_path / "run.toml"
    rest = '[optim]\nlr = 1e-3\n[data]\ntokens = "t"\ntokenizer = "t"\n[save]\nfolder = "r"\n'
    sections = plan.toml(4096).replace("[train]\n", "[train]\nsteps = 1\n")
    model_part = whole[whole.index("[model]") :].split("\n[")[0]
    file.write_text(f"{model_part}\n{rest}{sections}")
    degrees = resolve(load_config(file), there.gpus)
    assert degrees.world_size == there.gpus


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (4, {"zero": 0}),
        (4, {"zero": 1}),
        (4, {"zero": 2}),
        (4, {"zero": 3}),
        (4, {"dp_replicate": 2, "dp_shard": 2}),
        (4, {"tp": 2}),
        (2, {"pp": 2}),
    ],
)
def test_memory_is_that_of_the_dry_run(
    tmp_path: Path, world: int, parallel: dict[str, Any]
) -> None:
    train = {"dtype": "float32", "precision": "bf16", "micro_batch": 1}
    config = run_config("tied" if "pp" not in parallel else "dense", train, **parallel)
    model = replace(config.model, vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8)
    config = replace(config, model=model)
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf()))
    sizes = model_sizes(tmp_path)
    run = plan_run(config, world)
    fullest = max(run.ranks, key=lambda rank: rank.total_bytes)
    plan = replace(
        plan_training(sizes, Machines(gpus=1, memory=80 * GB), 8),
        dp_replicate=run.degrees.dp_replicate,
        dp_shard=run.degrees.dp_shard,
        tp=run.degrees.tp,
        pp=run.degrees.pp,
        zero=config.parallel.zero,
    )
    memory = train_memory(sizes, plan, 8)
    assert memory.weights == pytest.approx(fullest.parameter_bytes, rel=0.04)
    assert memory.gradients == pytest.approx(fullest.gradient_bytes, rel=0.04)
    assert memory.optimizer == pytest.approx(fullest.optimizer_bytes, rel=0.04)


def test_adapters_need_less(tmp_path: Path) -> None:
    sizes = model_sizes(config_file(tmp_path, "8B"))
    plan = plan_training(sizes, Machines(gpus=1, memory=80 * GB), 4096, lora=True)
    assert (plan.name, plan.recompute) == ("one GPU", "none")
    assert "[lora]" in plan.toml(4096)


def test_serving(tmp_path: Path) -> None:
    sizes = model_sizes(config_file(tmp_path, "70B"))
    rows = {r.type: r for r in plan_serving(sizes, Machines(gpus=4, memory=24 * GB), 4096)}
    assert rows["F16"].gpus is None
    assert (rows["Q6_K"].gpus, rows["Q4_K_M"].gpus, rows["Q2_K"].gpus) == (3, 3, 2)
    assert list(rows) == list(TYPES)
    totals = [r.total for r in rows.values()]
    assert totals == sorted(totals, reverse=True)


def test_the_command(tmp_path: Path) -> None:
    path = str(config_file(tmp_path, "8B"))
    run = CliRunner().invoke(cli, ["plan", path, "--gpus", "8"], catch_exceptions=False)
    assert "ZeRO-2" in run.stdout
    assert "[parallel]\ndp_shard = 8\nzero = 2\n" in run.stdout
    assert "recommended" in run.stdout
    run = CliRunner().invoke(cli, ["plan", path, "--json", "--serve"], catch_exceptions=False)
    said = json.loads(run.stdout)
    assert "train" not in said
    assert [row["type"] for row in said["serve"]] == list(TYPES)
    run = CliRunner().invoke(cli, ["plan", path, "--json", "--train"], catch_exceptions=False)
    assert json.loads(run.stdout)["train"]["offload"]
    with pytest.raises(ConfigError, match=r"run\.toml.*give that.*--dry-run"):
        model_sizes(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="cannot be shared evenly by 3 nodes"):
        Machines(gpus=8, memory=GB, nodes=3)


@pytest.mark.parametrize("layout", ["hf", "zero3", "megatron"])
def test_checkpoints_of_every_layout(layout: str) -> None:
    folder = Path(__file__).parents[2] / "fixtures" / "trained"
    sizes = model_sizes(folder / layout, folder / "hf")
    assert (sizes.parameters, sizes.layers) == (
        model_sizes(folder / "hf").parameters,
        model_sizes(folder / "hf").layers,
    )
