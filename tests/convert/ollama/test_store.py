"""Models installed offline, checked by an independent reader; bundles; verification."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
from mconv.convert.gguf import open_gguf
from mconv.convert.ollama.build import Wishes
from mconv.convert.ollama.bundle import bundle, unbundle
from mconv.convert.ollama.install import Installed, install
from mconv.convert.ollama.layers import file_type_name, human_count
from mconv.convert.ollama.names import parse_name
from mconv.convert.ollama.store import Store
from mconv.convert.ollama.verify import verify
from mconv.errors import ConfigError, FormatError, MconvError, OutputError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parent))
import chats
import models
from store_reader import read_store

WISHES = Wishes(
    source="x",
    system='Sei kurz.\u3000\u200d\n"""\n',  # a Modelfile could not carry this
    messages=[("user", "a"), ("assistant", "b")],
    parameters={"seed": 3},
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.chat_gguf(tmp_path_factory.mktemp("model") / "chat.gguf", chats.CHATML)


def put(source: Path, root: Path, name: str = "me/tiny:v1", **more: object) -> Installed:
    return install(source, parse_name(name), Store(root), WISHES, **more)  # type: ignore[arg-type]


def test_a_gguf_is_stored_unchanged(gguf: Path, tmp_path: Path) -> None:
    done = put(gguf, tmp_path / "s")
    stored = read_store(tmp_path / "s")
    model = stored["registry.ollama.ai/me/tiny:v1"]
    assert model["model"] == gguf.read_bytes()
    assert model["kinds"] == ["model", "template", "system", "params", "messages"]
    assert model["template"].decode() == done.made.modelfile.template
    assert model["system"].decode() == WISHES.system
    assert json.loads(model["params"]) == {
        "num_ctx": 256,
        "seed": 3,
        "stop": ["<|im_end|>", "</s>"],
    }
    assert json.loads(model["messages"])[1] == {"role": "assistant", "content": "b"}
    assert model["id"] == done.id
    config = model["config"]
    assert (config["model_format"], config["model_family"]) == ("gguf", "llama")
    assert (config["file_type"], config["os"], config["architecture"]) == ("Q8_0", "linux", "amd64")
    assert config["model_type"].endswith("K")
    assert verify(Store(tmp_path / "s"), parse_name("ME/tiny:V1")) == ()  # lookup ignores case


@pytest.mark.parametrize(("kind", "stored"), [("Q8_0", "Q8_0"), (None, "BF16")])
def test_a_checkpoint_in_one_call(
    gguf: Path, tmp_path: Path, kind: str | None, stored: str
) -> None:
    put(gguf.with_suffix(""), tmp_path / "s", quantize=kind)
    model = read_store(tmp_path / "s")["registry.ollama.ai/me/tiny:v1"]
    (tmp_path / "m.gguf").write_bytes(model["model"])
    assert model["config"]["file_type"] == stored
    names = {t.type.name for t in open_gguf(tmp_path / "m.gguf").tensors.values()}
    assert stored in names


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("zero3", {"config": models.TRAINED, "tokenizer": models.TRAINED}),
        ("megatron", {"tokenizer": models.TRAINED}),
    ],
)
def test_a_sharded_training_checkpoint_in_one_call(
    tmp_path: Path, layout: str, options: dict
) -> None:
    put(models.TRAINED.parent / layout, tmp_path / "s", quantize="q8_0", options=options)
    put(models.TRAINED, tmp_path / "s", "merged", quantize="q8_0")
    sharded, merged = read_store(tmp_path / "s").values()
    assert sharded["config"] == merged["config"] | {"rootfs": sharded["config"]["rootfs"]}


def test_two_models_share_their_blobs(gguf: Path, tmp_path: Path) -> None:
    put(gguf, tmp_path / "s")
    before = sorted(p.name for p in (tmp_path / "s" / "blobs").iterdir())
    put(gguf, tmp_path / "s", "other")
    assert sorted(p.name for p in (tmp_path / "s" / "blobs").iterdir()) == before
    assert len(read_store(tmp_path / "s")) == 2


def test_a_refused_template_leaves_nothing(gguf: Path, tmp_path: Path) -> None:
    varying = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    folder = models.chat_model(tmp_path / "m", varying)
    with pytest.raises(UnsupportedError):
        put(folder, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_an_interrupted_install_shows_no_model(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "write_manifest", fail)
    with pytest.raises(OutputError, match="No space left"):
        put(gguf, tmp_path / "s")
    assert Store(tmp_path / "s").names() == []
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["blobs"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_permissions_are_explained(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="sudo -u ollama"):
        put(gguf, tmp_path / "s")


@pytest.mark.parametrize(
    ("damage", "problem"), [("flip", "is damaged"), ("cut", "bytes, the manifest says"),
                            ("remove", "is missing")],
)  # fmt: skip
def test_verify_finds_damage(gguf: Path, tmp_path: Path, damage: str, problem: str) -> None:
    done = put(gguf, tmp_path / "s")
    blob = Store(tmp_path / "s").blob_path(done.digest)
    data = bytearray(blob.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        blob.write_bytes(data)
    elif damage == "cut":
        blob.write_bytes(data[:-1])
    else:
        blob.unlink()
    assert problem in verify(Store(tmp_path / "s"), parse_name("me/tiny:v1"))[0]


@pytest.mark.parametrize(
    ("kind", "data", "problem"),
    [
        ("params", b'{"temperature":"hot"}', "'hot' is text, expected a number"),
        ("params", b'{"temprature":1.0}', "did you mean 'temperature'"),
        ("params", b"[1]", "is no JSON object"),
        ("template", b"{{ if }}", "missing value for if"),
        ("messages", b'[{"role":"tool","content":"x"}]', "is no message"),
        ("model", b"GGUF", "shorter than a GGUF header"),
        ("nothing", b"x", "unknown media type"),
    ],
)
def test_verify_finds_what_a_server_finds_late(
    gguf: Path, tmp_path: Path, kind: str, data: bytes, problem: str
) -> None:
    put(gguf, tmp_path / "s")
    store, name = Store(tmp_path / "s"), parse_name("me/tiny:v1")
    with store.work_folder() as work:
        layer = store.add_bytes(work, data, f"application/vnd.ollama.image.{kind}")
        manifest = json.loads(store.read(name).raw)
        manifest["layers"].append(layer.as_json())
        store.write_manifest(work, name, json.dumps(manifest).encode())
    assert problem in " ".join(verify(store, name))


def test_bundles_travel(gguf: Path, tmp_path: Path) -> None:
    put(gguf, tmp_path / "a")
    name = parse_name("me/tiny:v1")
    for out in ("x.tar", "y.tar"):
        bundle(Store(tmp_path / "a"), name, tmp_path / out)
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "y.tar").read_bytes()
    unbundle(Store(tmp_path / "b"), tmp_path / "x.tar")
    unbundle(Store(tmp_path / "b"), tmp_path / "x.tar", parse_name("other"))
    read = read_store(tmp_path / "b")
    assert set(read) == {"registry.ollama.ai/me/tiny:v1", "registry.ollama.ai/library/other:latest"}
    assert read["registry.ollama.ai/me/tiny:v1"] == next(iter(read_store(tmp_path / "a").values()))


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("../evil", b"x"),
        ("blobs/../../evil", b"x"),
        ("manifests/../../../../evil", b"{}"),
        ("manifests/a/b/c/..", b"{}"),
        (f"blobs/sha256-{'0' * 64}", b"x"),
    ],
)
def test_hostile_bundles(tmp_path: Path, member: str, data: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        entry = tarfile.TarInfo(member)
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    with pytest.raises(MconvError):
        unbundle(Store(tmp_path / "s"), tmp_path / "x.tar")
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "s").exists()


def test_cut_bundles(gguf: Path, tmp_path: Path) -> None:
    put(gguf, tmp_path / "a")
    bundle(Store(tmp_path / "a"), parse_name("me/tiny:v1"), tmp_path / "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "mine").mkdir()
    for size in (0, 100, len(data) // 2, len(data) - 12_000):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        for root in ("b/models", "mine"):
            with pytest.raises(FormatError):
                unbundle(Store(tmp_path / root), tmp_path / "cut.tar")
        assert not (tmp_path / "b").exists()
        assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("llama", "registry.ollama.ai/library/llama/latest"),
        ("llama:7b", "registry.ollama.ai/library/llama/7b"),
        ("me/llama:7b", "registry.ollama.ai/me/llama/7b"),
        ("hf.co/me/Llama-3.1:Q4_K_M", "hf.co/me/Llama-3.1/Q4_K_M"),
    ],
)
def test_names(text: str, full: str) -> None:
    assert parse_name(text).path == Path(full)
    assert parse_name(str(parse_name(text))) == parse_name(text)


@pytest.mark.parametrize(
    "text", ["", "a/b/c/d", "-a", "a:", "a b", "../x", "a/..", "x" * 81, "a:b:c", ".hidden"]
)
def test_bad_names(text: str) -> None:
    with pytest.raises(ConfigError, match="model name"):
        parse_name(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (121_300, "121K"), (7_620_000, "7.62M"), (2_000_000, "2M"),
     (1_540_000_000, "1.5B"), (8 * 10**9, "8B")],
)  # fmt: skip
def test_counts_for_people(count: int, text: str) -> None:
    assert human_count(count) == text


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "F32"), (1, "F16"), (7, "Q8_0"), (15, "Q4_K_M"), (32, "BF16"), (999, "unknown"),
     (None, "unknown")],
)  # fmt: skip
def test_file_types(number: int | None, name: str) -> None:
    assert file_type_name(number) == name
