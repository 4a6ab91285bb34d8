"""Megatron writers: what they write is read back bit for bit, equals what Megatron wrote where it
wrote the same, and layouts that cannot hold the model are refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mconv import reshard
from mconv.errors import LayoutError
from mconv.shardio import Checkpoint, Layout, dtypes, open_checkpoint
from mconv.shardio.dcp_folder import DcpFolder
from mconv.shardio.records import StoredTensor
from mconv.shardio.stored import lazy, plain
from mconv.shardio.tensor import LazyTensor, from_array
from mconv.shardio.torchfile import open_torch_file
from mconv.shardio.training_state import optimizer_step

VOCAB = 317
FILE = "model_optim_rng.pt"
CASES = [
    "deepseek_tp2ep2",
    "gpt2_tp2pp2",
    "llama_tied_tp2pp2",
    "llama_tp1pp1",
    "llama_tp2pp2",
    "llama_tp2pp2_vpp2",
    "llama_tp4_gqa2",
    "mixtral_ep2",
    "mixtral_grouped_tp2ep2",
    "mixtral_tp2ep2_etp1",
    "opt_dist_tp2dp2",
    "opt_fp32_tp2",
    "qwen2_bias_tp2",
    "qwen3moe_tp2ep2pp2",
]
HIDDEN = 8


def own_layout(ckpt: Checkpoint, format: str, case: str) -> Layout:
    """The layout that Megatron used for a fixture."""
    etp = ckpt.layout.etp
    stage = int(case.startswith("opt_dist"))
    return replace(ckpt.layout, format=format, etp=etp, zero_stage=stage, cp=1, dp=1)


# -- what Megatron itself wrote -------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_rank_files_equal_those_of_megatron(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    source = open_checkpoint(fixtures_dir / "megatron" / case / "torch")
    reshard(source, tmp_path / "out", own_layout(source, "megatron", case), vocab_size=VOCAB)
    written = sorted((tmp_path / "out").rglob("mp_rank_*/*.pt"))
    theirs = sorted(source.path.rglob("mp_rank_*/*.pt"))
    assert [p.parts[-2:] for p in written] == [p.parts[-2:] for p in theirs]
    for ours, original in zip(written, theirs, strict=True):
        a, b = open_torch_file(ours).root, open_torch_file(original).root
        if ours.name == FILE:
            models = [k for k in b if k.startswith("model")]
            assert [in_order(a[k]) for k in models] == [in_order(b[k]) for k in models]
            same_settings(plain(a["args"]), plain(b["args"]))
            a, b = ({k: root.get(k) for k in (*models, "optimizer")} for root in (a, b))
        same_trees(a, b, original.name)
    back = open_checkpoint(tmp_path / "out")
    same_weights(back.weights, source.weights)
    for state, tensors in source.optimizer.items():
        same_weights(back.optimizer[state], tensors)


def in_order(model: Mapping[str, Any]) -> list[str]:
    """Names of the tensors as saved: the optimizer numbers them so."""
    return [name for name in model if not name.endswith("_extra_state")]


def same_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """All that a loader or a model is built from."""
    for key in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
        "padded_vocab_size", "make_vocab_size_divisible_by", "tensor_model_parallel_size",
        "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "rank",
        "expert_model_parallel_size", "expert_tensor_parallel_size", "num_experts", "swiglu",
        "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
        "untie_embeddings_and_output_weights", "params_dtype", "bf16", "fp16", "transformer_impl",
        "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "add_bias_linear",
        "normalization", "layernorm_epsilon", "rotary_base", "position_embedding_type",
    ):  # fmt: skip
        if key.startswith("moe_") and not b["num_experts"]:
            continue
        assert a.get(key) == b.get(key), key


def same_trees(a: Any, b: Any, where: str) -> None:
    """Equal nested data; vocabulary padding, which Megatron fills with noise, is left out."""
    if isinstance(b, StoredTensor):
        x, y = lazy(a).read(), lazy(b).read()
        assert (x.shape, x.dtype) == (y.shape, y.dtype), where
        assert np.all((x == y) | (x == 0)), where  # padding; what is read back tells the rest
    elif isinstance(b, dict):
        ours = {k: v for k, v in a.items() if k != "step" or k in b}
        assert list(map(str, ours)) == list(map(str, b)) or set(ours) == set(b), where
        for key, value in b.items():
            same_trees(a[key], value, f"{where}/{key}")
    elif isinstance(b, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            same_trees(x, y, f"{where}/{k}")
    else:
        assert plain(a) == plain(b), where


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("opt")])
def test_distributed_keys_and_pieces_equal_those_of_megatron(
    fixtures_dir: Path, tmp_path: Path, case: str
) -> None:
    theirs = open_checkpoint(fixtures_dir / "megatron" / case / "torch_dist")
    layout = own_layout(theirs, "megatron-dist", case)
    reshard(theirs, tmp_path / "out", layout, vocab_size=VOCAB)
    written = open_checkpoint(tmp_path / "out")
    a, b = DcpFolder(written.path).metadata, DcpFolder(theirs.path).metadata
    assert set(a.tensors) == set(b.tensors)
    for key, entry in b.tensors.items():
        assert a.tensors[key].shape == entry.shape, key
        if ".mlp.experts." in key and "grouped" in case:
            continue  # Megatron saves all experts of a rank in one piece
        pieces = [{(c.offsets, c.sizes) for c in e.chunks} for e in (a.tensors[key], entry)]
        assert pieces[0] == pieces[1], key
    assert set(a.objects) == {k for k in b.objects if not k.startswith("rng_state")}
    same_weights(written.weights, theirs.weights)


def same_weights(a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor]) -> None:
    """Equal bytes, vocabulary padding aside."""
    assert set(a) == set(b)
    for name, tensor in b.items():
        rows = VOCAB if name.startswith(("embedding.word", "output_layer")) else None
        assert a[name].dtype == tensor.dtype
        assert a[name].read()[:rows].tobytes() == tensor.read()[:rows].tobytes(), name


# -- layouts at random ----------------------------------------------------------------------------


def tensors_of(model: Mapping[str, Any], rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """Names and random values of a llama-like Hugging Face model, perhaps with experts."""
    h, d, f = HIDDEN, model["head_dim"], model["intermediate_size"]
    heads, groups = model["num_attention_heads"], model["num_key_value_heads"]

    def rand(*shape: int) -> Any:
        return from_array(rng.standard_normal(shape).astype(np.float32))

    yield "model.embed_tokens.weight", rand(model["vocab_size"], h)
    for i in range(model["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, rows in (("q", heads * d), ("k", groups * d), ("v", groups * d)):
            yield f"{at}self_attn.{name}_proj.weight", rand(rows, h)
        yield f"{at}self_attn.o_proj.weight", rand(h, heads * d)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{norm}.weight", rand(h)
        experts = model.get("num_local_experts", 0)
        if experts:
            yield f"{at}block_sparse_moe.gate.weight", rand(experts, h)
        for e in range(experts):
            for name, shape in (("w1", (f, h)), ("w3", (f, h)), ("w2", (h, f))):
                yield f"{at}block_sparse_moe.experts.{e}.{name}.weight", rand(*shape)
        if not experts:
            for name, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
                yield f"{at}mlp.{name}_proj.weight", rand(*shape)
    yield "model.norm.weight", rand(h)
    if not model["tie_word_embeddings"]:
        yield "lm_head.weight", rand(model["vocab_size"], h)


def make(config: Mapping[str, Any], *, trained: bool, half: bool = False) -> Checkpoint:
    """A checkpoint in Hugging Face names; ``trained``: with Adam's state, ``half``: in bf16."""
    rng = np.random.default_rng(0)
    masters = dict(tensors_of(config, rng))
    states = {}
    if trained:
        states = {s: dict(tensors_of(config, rng)) for s in ("exp_avg", "exp_avg_sq")}
        states["master"] = masters
    weights = masters
    if half:
        bf16 = dtypes.BFLOAT16
        weights = {n: from_array(t.cast(bf16).read()) for n, t in masters.items()}
    groups = [{"lr": 0.1, "betas": [0.9, 0.9], "eps": 1e-8, "weight_decay": w} for w in (0.1, 0.0)]
    return Checkpoint(
        path=Path("made"),
        format="made",
        weights=weights,
        optimizer=states,
        config=dict(config),
        step=7 if trained else None,
        scalars={"param_groups": groups, "optimizer_steps": [5]} if trained else {},
    )


def llama(**more: Any) -> dict[str, Any]:
    """A small config.json."""
    return {
        "model_type": "llama", "vocab_size": 11, "hidden_size": HIDDEN, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 12,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


def mixtral(**more: Any) -> dict[str, Any]:
    """A small config.json with experts."""
    return llama(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, **more)


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], Layout, bool]:
    moe = draw(st.booleans())
    make_config = mixtral if moe else llama
    groups = draw(st.sampled_from([1, 2, 4]))
    config = make_config(num_key_value_heads=groups, tie_word_embeddings=draw(st.booleans()))
    tp = draw(st.sampled_from([1, 2, 4] if groups > 1 else [1, 2]))
    pp, vpp = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2)]))
    uneven = {1: None, 2: (3, 1), 4: (0, 2, 1, 1)}[pp] if vpp == 1 and draw(st.booleans()) else None
    layout = Layout(
        draw(st.sampled_from(["megatron", "megatron-dist"])),
        tp=tp, pp=pp, vpp=vpp, pp_layers=uneven,
        ep=draw(st.sampled_from([1, 2, 4])) if moe else 1,
        etp=draw(st.sampled_from([None, 1])) if moe else None,
        zero_stage=draw(st.sampled_from([0, 1])),
        make_vocab_divisible_by=draw(st.sampled_from([None, 1, 5])),
        transformer_impl=draw(st.sampled_from([None, "local"])),
    )  # fmt: skip
    return config, layout, draw(st.booleans())


@given(runs())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_layout_is_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], Layout, bool]
) -> None:
    config, layout, half = drawn
    folder = tmp_path_factory.mktemp("run")
    source = make(config, trained=True, half=half)
    reshard(source, folder / "out", layout)
    back = open_checkpoint(folder / "out")
    assert back.format == layout.format.replace("-", "_")
    assert (back.layout.tp, back.layout.pp, back.layout.ep) == (layout.tp, layout.pp, layout.ep)
    assert back.step == 7
    assert optimizer_step(back) == 5
    reshard(back, folder / "hf", Layout("hf"), with_optimizer=True)
    check_same(open_checkpoint(folder / "hf"), source)


def check_same(found: Checkpoint, source: Checkpoint) -> None:
    """Weights and optimizer states, bit for bit."""
    assert set(found.weights) == set(source.weights)
    assert set(found.optimizer) == set(source.optimizer)
    for name, tensor in source.weights.items():
        assert found.weights[name].dtype == tensor.dtype
        assert found.weights[name].read().tobytes() == tensor.read().tobytes(), name
    for state, tensors in source.optimizer.items():
        assert set(found.optimizer[state]) == set(tensors)
        for name, tensor in tensors.items():
            own = found.optimizer[state][name].read()
            assert own.tobytes() == tensor.read().tobytes(), (state, name)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_chain_of_layouts_keeps_every_moment(tmp_path: Path, stage: int, half: bool) -> None:
    source = make(llama(), trained=True, half=half)
    chain = [
        Layout("megatron", tp=2, zero_stage=stage),
        Layout("megatron", pp=2, zero_stage=stage),
        Layout("megatron", tp=2, pp=2, vpp=2, zero_stage=stage),
        Layout("megatron-dist", tp=4, pp=4, zero_stage=stage),
        Layout("deepspeed", zero_stage=3, dp=3),
        Layout("megatron", tp=2, transformer_impl="local"),
        Layout("hf"),
    ]
    at: Checkpoint | Path = source
    for k, layout in enumerate(chain):
        # ZeRO-3 holds the weights in fp32 only
        layout = replace(layout, dtype="bf16") if half and chain[k - 1].zero_stage == 3 else layout
        reshard(at, tmp_path / str(k), layout, with_optimizer=True)
        at = tmp_path / str(k)
    check_same(open_checkpoint(at), source)


def test_megatron_to_zero_3_and_back(fixtures_dir: Path, tmp_path: Path) -> None:
    source = open_checkpoint(fixtures_dir / "megatron" / "opt_dist_tp2dp2" / "torch")
    zero = Layout("deepspeed", zero_stage=3, dp=2)
    reshard(source, tmp_path / "zero", zero, vocab_size=VOCAB)
    reshard(
        tmp_path / "zero", tmp_path / "back", Layout("megatron", tp=2, zero_stage=1, dtype="bf16")
    )
    back = open_checkpoint(tmp_path / "back")
    same_weights(back.weights, source.weights)
    for state, tensors in source.optimizer.items():
        same_weights(back.optimizer[state], tensors)
    groups = [g["weight_decay"] for g in back.scalars["param_groups"]]
    assert groups == [g["weight_decay"] for g in source.scalars["param_groups"]]


def test_bare_weights_are_a_release(tmp_path: Path) -> None:
    for format in ("megatron", "megatron-dist"):
        reshard(make(llama(), trained=False), tmp_path / format, Layout(format, tp=2))
        tracker = tmp_path / format / "latest_checkpointed_iteration.txt"
        assert tracker.read_text() == "release"
        assert open_checkpoint(tmp_path / format).path.name == "release"


def test_settings_that_megatrons_converter_asks_for(tmp_path: Path) -> None:
    reshard(make(llama(), trained=False), tmp_path / "out", Layout("megatron", tp=2))
    args = open_checkpoint(tmp_path / "out").args
    assert args["sequence_parallel"] is args["apply_query_key_layer_scaling"] is False
    assert args["norm_epsilon"] == args["layernorm_epsilon"] == llama()["rms_norm_eps"]


# -- layouts that cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "layout", "hint"),
    [
        (llama(), "megatron:tp=3", "4 attention heads .*nearest valid: tp=2 or tp=4"),
        (llama(), "megatron:tp=8", "nearest valid: tp=4"),
        (llama(intermediate_size=6), "megatron:tp=4", "columns of the MLP.*tp=2"),
        (llama(num_attention_heads=6, num_key_value_heads=3), "megatron:tp=2", "3 query groups"),
        (llama(), "megatron:pp=3", "nearest valid: pp=2 or pp=4.*--pp-layers 2,1,1"),
        (llama(), "megatron:pp=2,vpp=4", "use --vpp 1|nearest valid"),
        (llama(), "megatron:vpp=2", "needs pipeline stages"),
        (llama(), "megatron:pp=2,pp_layers=3+2", "5 layers, the model has 4"),
        (llama(), "megatron:pp=2,pp_layers=1+1+2", "3 numbers for pp=2"),
        (llama(), "megatron:ep=2", "no experts"),
        (mixtral(), "megatron:ep=3", "4 experts .*nearest valid: ep=2 or ep=4"),
        (mixtral(), "megatron:tp=2,etp=8", "nearest valid: etp=6 or etp=12"),
        (mixtral(), "megatron:tp=1,etp=2", "no names for expert tensor ranks"),
        (llama(), "megatron:zero_stage=3,dp=2", "stage 1"),
        (llama(), "megatron-dist:tp=3", "nearest valid: tp=2 or tp=4"),
    ],
)
def test_impossible_layouts_name_the_nearest(
    tmp_path: Path, config: dict[str, Any], layout: str, hint: str
) -> None:
    with pytest.raises(LayoutError, match=hint):
        reshard(make(config, trained=False), tmp_path / "out", Layout.parse(layout))
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_is_padded_as_megatron_pads(tmp_path: Path) -> None:
    source = make(llama(vocab_size=300), trained=False)
    rows: Callable[[Layout], int] = lambda layout: _padded(source, tmp_path, layout)  # noqa: E731
    assert rows(Layout("megatron", tp=2)) == 512
    assert rows(Layout("megatron", tp=4)) == 512
    assert rows(Layout("megatron")) == 384
    assert rows(Layout("megatron", tp=4, make_vocab_divisible_by=1)) == 300


def _padded(source: Checkpoint, tmp_path: Path, layout: Layout) -> int:
    reshard(source, tmp_path / "out", layout, force=True)
    back = open_checkpoint(tmp_path / "out")
    assert back.args["padded_vocab_size"] == back.weights["output_layer.weight"].shape[0]
    return back.weights["embedding.word_embeddings.weight"].shape[0]
