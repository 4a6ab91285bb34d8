"""TensorFlow checkpoints: TF1 Savers (partitioned variables too) and TF2 object graphs.

``checkpoint`` names the newest prefix of a folder. TF2 variables get the path below the root's
``model``, those of Hugging Face's TensorFlow models their own names; kernels stay [in, out] as
TensorFlow has them (see ``convert/naming``). Read in pure Python: see ``tensor_bundle.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import FormatError, UnsupportedError, counted
from ..assets import load_json
from ..checkpoint import Checkpoint
from ..coverage import prove
from ..layout import Layout
from ..registry import Format, OpenOptions
from ..source import read_small
from ..state_checkpoint import model_files
from ..tensor import LazyTensor
from ..tensor_bundle import STRING, Bundle, is_index, open_bundle
from ..tf_objects import GRAPH_KEY, SUFFIX, Variable, variables

_LATEST = re.compile(r'^model_checkpoint_path:\s*"([^"]+)"', re.MULTILINE)
_LIST = re.compile(r"(?<=\blayers\.)layer[-_](\d+)(?=\.)")  # a list kept as attributes
_DATA = re.compile(r"\.data-\d{5}-of-\d{5}$")
_COUNTERS = ("step", "global_step", "iterations", "optimizer/_iterations", "save_counter")
_SLOTS = {"Adam": "exp_avg", "Adam_1": "exp_avg_sq", "Momentum": "momentum",
          "adam_m": "exp_avg", "adam_v": "exp_avg_sq"}  # fmt: skip
_FACTORED = ("_slot_v", "_slot_vr", "_slot_vc", "_slot_m")  # of mesh TensorFlow's Adafactor
_SETTINGS = ("hparams.json", "bert_config.json")
#: (naming, a name with # for the layer)
_WORLDS = (
    ("gpt2_tf", "model.h#.attn.c_attn.w"),
    ("bert_tf", "bert.encoder.layer_#.attention.self.query.kernel"),
    ("t5_tf", "encoder.block_#.layer_#.SelfAttention.q"),
)
_NUMBER = re.compile(r"(?<=[h_])\d+(?=\.)")
_HF_LIST = "_._"  # how Hugging Face's TensorFlow models number lists
_OPTIMIZER = ("optimizer", "_optimizer", "opt")


def detect(path: Path) -> Path | None:
    """Return the index file of the newest checkpoint of a folder, or of a file's own."""
    if path.is_file():
        name = _DATA.sub(".index", path.name)
        beside = path.with_name(name)
        if path.name == "checkpoint":
            return _newest(path.parent)
        return beside if beside.suffix == ".index" and is_index(beside) else None
    return _newest(path)


def _newest(folder: Path) -> Path | None:
    try:
        found = _LATEST.search(read_small(folder / "checkpoint").decode("utf-8")[:65536])
    except (OSError, ValueError):
        found = None
    if found:
        index = folder / f"{Path(found[1]).name}.index"
        if is_index(index):
            return index
    indexes = [p for p in sorted(folder.glob("*.index")) if is_index(p)]
    return indexes[0] if len(indexes) == 1 else None


def open_tensorflow(root: Path, options: OpenOptions) -> Checkpoint:
    """Open the checkpoint of an index file.

    Raises:
        FormatError: damaged index, missing or short data files, no variables.
        UnsupportedError: compressed indexes, big-endian data.
    """
    bundle = open_bundle(root.with_name(root.name.removesuffix(".index")))
    notes: list[str] = []
    optimizer: dict[str, dict[str, LazyTensor]] = {}
    if GRAPH_KEY in bundle.names():
        weights = _from_objects(bundle, notes)
    else:
        weights, optimizer = _from_names(bundle, notes)
    if not weights:
        raise FormatError(f"{root}: holds no variables that could be model weights")
    prove(weights, root)
    config, assets = model_files(root, options)
    return Checkpoint(
        path=root,
        format="tensorflow",
        naming=_world(weights),
        weights=weights,
        optimizer=optimizer,
        step=_step(bundle),
        config=config,
        args=_own_settings(root),
        layout=Layout(format="tensorflow"),
        checksums=bundle.checksums(),
        assets=assets,
        warnings=tuple(notes),
    )


def _world(weights: Mapping[str, LazyTensor]) -> str:
    """Tell whose names they are by one marker each."""
    seen = {_NUMBER.sub("#", n) for n in weights}
    for naming, marker in _WORLDS:
        if marker in seen:
            return naming
    if any(_HF_LIST in n for n in weights):
        return "hf_tf"
    return "hf" if any(n.startswith("model.") for n in weights) else "tensorflow"


def _own_settings(root: Path) -> dict[str, Any]:
    """The settings that OpenAI and Google keep beside their models, by file name."""
    places = {name: root.with_name(name) for name in _SETTINGS}
    return {name: load_json(path) for name, path in places.items() if path.is_file()}


def _from_objects(bundle: Bundle, notes: list[str]) -> dict[str, LazyTensor]:
    """Name each variable by its path below ``model``, else by the shortest outside an optimizer."""
    try:
        found = variables(bundle.string(GRAPH_KEY))
    except (ValueError, IndexError) as e:
        raise FormatError(f"{bundle.prefix}: the object graph is damaged ({e})") from e
    listed = any(_HF_LIST in v.full_name for v in found)
    has_model = any(path[:1] == ("model",) for v in found for path in v.paths)
    weights: dict[str, LazyTensor] = {}
    others = []
    for variable in found:
        entry = bundle.entries.get(variable.key.encode())
        if entry is None:
            raise FormatError(f"{bundle.prefix}: {variable.key!r} of the graph is not in the index")
        path = _own_path(variable, has_model)
        if path is None or entry.dtype == STRING:
            others.append(variable.key)
            continue
        name = _LIST.sub(r"\1", ".".join(path))
        if listed and variable.full_name:
            name = variable.full_name.replace("/", ".")
        weights[name] = bundle.tensor(variable.key)
    if others:
        notes.append(
            "left out, as not the model's (optimizer, counters): "
            f"{counted(len(others), 'variable')}, "
            f"such as {others[0].removesuffix(SUFFIX)}"
        )
    return weights


def _own_path(variable: Variable, has_model: bool) -> tuple[str, ...] | None:
    for path in variable.paths:
        if has_model and path[:1] == ("model",):
            return path[1:]
        if not has_model and len(path) > 1 and path[0] not in _OPTIMIZER:
            return path
    return None


def _from_names(
    bundle: Bundle, notes: list[str]
) -> tuple[dict[str, LazyTensor], dict[str, dict[str, LazyTensor]]]:
    """Variables of a TF1 Saver; slots of Adam lie below their variable."""
    names = bundle.names()
    known = set(names)
    factored = {n for n in names if n.endswith(_FACTORED) and n.rpartition("_slot")[0] in known}
    if factored:
        notes.append(f"{len(factored)} factored optimizer states (Adafactor) are left out")
    weights: dict[str, LazyTensor] = {}
    states: dict[str, dict[str, LazyTensor]] = {}
    for name in names:
        if not name or name in _COUNTERS or name.endswith(("_power", "/ExponentialMovingAverage")):
            continue
        if name in factored:
            continue
        owner, _, slot = name.rpartition("/")
        try:
            tensor = bundle.tensor(name)
        except UnsupportedError:
            notes.append(f"{name} is no number and is left out")
            continue
        if slot in _SLOTS and owner in known:
            states.setdefault(_SLOTS[slot], {})[owner.replace("/", ".")] = tensor
        else:
            weights[name.replace("/", ".")] = tensor
    return weights, states


def _step(bundle: Bundle) -> int | None:
    for name in _COUNTERS[:-1]:
        for key in (name, name + SUFFIX):
            entry = bundle.entries.get(key.encode())
            if entry is not None and entry.shape == () and entry.size == 8:
                return int(bundle.tensor(key).read().item())
    return None


FORMAT = Format("tensorflow", "TensorFlow checkpoint", detect, open_tensorflow, rank=60)
