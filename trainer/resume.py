"""The hook that saves a run and resumes it, and where a resumed run starts.

``auto`` takes the newest whole checkpoint of the run's folder; a path may be a checkpoint of any
format and layout with its optimizer. The order of the data is a function of the step
(``data.py``), so nothing of it is saved but a fingerprint, which must not change.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver

from ..convert.naming import to_hf
from ..convert.reshard import reshard
from ..errors import ConfigError, FormatError, did_you_mean
from ..shardio import Layout, open_checkpoint
from ..shardio.training_state import optimizer_step
from .checkpoint import MANIFEST, Also, Saver, check_files, steps_of
from .hooks import Hook, Run
from .metrics import StepMetrics
from .text.tokenizer import load_tokenizer
from .training_state import content_of, load_optimizer, load_parameters, read_own

FORMATS = ("shards", "dcp", "hf")
_OURS = ("config.json", "generation_config.json", MANIFEST)


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a run's folder, and why newer ones are passed over."""
    notes: list[str] = []
    for _, folder in reversed(steps_of(run)):
        if not (folder / MANIFEST).exists() and any(folder.glob("*.metadata")):
            return folder, notes  # torch's own format has its own marker
        try:
            check_files(folder)
        except FormatError as error:
            notes.append(str(error))
        else:
            return folder, notes
    return None, notes


def find(resume: str, run: Path) -> Path | None:
    """Return what a run resumes from: ``auto``, ``none`` or a path.

    Raises:
        ConfigError: the path does not exist.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return newest(run)[0]
    path = Path(resume)
    if not path.exists():
        raise ConfigError(f"save.resume={resume}: no such file or folder")
    return path


class CheckpointHook(Hook):
    """Resumes at the start, saves every so many steps and at the end, also when told to end."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        """``tell`` gets what a user should know, on rank 0."""
        self._tell = tell or (lambda _: None)
        self._saver: Saver | None = None
        self._saved = -1
        self._asked = False

    def start(self, run: Run) -> None:
        self._listen()
        world = run.state.meshes.world
        _check_formats(run)
        self._saver = Saver(run.config.save, world.get_rank(), world.size())
        source = find(run.config.save.resume, run.config.save.folder)
        if source is None:
            return
        if run.config.save.resume == "auto" and run.first:
            for note in newest(run.config.save.folder)[1]:
                self._tell(f"passed over: {note}")
        restore(run, source)
        self._saved = run.state.step
        if run.first:
            self._tell(f"resumed step {run.state.step} from {source}")

    def _listen(self) -> None:
        """End after the current step when asked to (Ctrl-C, a scheduler's SIGTERM)."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._asked = True

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, ask)

    def step(self, run: Run, metrics: StepMetrics) -> None:
        run.stop = run.stop or self._anyone_asked(run)
        every = run.config.save.every
        if every and run.state.step % every == 0:
            self.save(run)

    def _anyone_asked(self, run: Run) -> bool:
        """Whether a rank was asked to end: then all do, after the same step."""
        if run.state.meshes.world.size() == 1:
            return self._asked
        asked = torch.tensor(self._asked, dtype=torch.uint8)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def stop(self, run: Run) -> None:
        if run.state.step != self._saved:
            self.save(run)
        assert self._saver is not None, "start was called"
        self._saver.wait()

    def save(self, run: Run) -> Path:
        """Save now; every rank calls this."""
        assert self._saver is not None, "start was called"
        self._saved = run.state.step
        own = {"data": run.data.fingerprint(), "batch": run.config.train.batch}
        texts, copies = _assets(run)
        content = content_of(run.state, own, texts, copies)
        return self._saver.save(run.state.step, content, _also(run))


def restore(run: Run, source: Path) -> None:
    """Load weights, optimizer and counters of a checkpoint into a run; every rank calls this.

    Raises:
        ConfigError: it does not fit the run, or its data is another.
    """
    ckpt = to_hf(open_checkpoint(source))
    own = read_own(ckpt.path if ckpt.path.is_dir() else ckpt.path.parent)
    fingerprint = run.data.fingerprint()
    if own.get("data") and fingerprint and own["data"] != fingerprint:
        raise ConfigError(
            f"{source}: was trained on other data (or another seq_len or seed) than [data] says "
            "now; to go on with other data start from its weights with model.init_from"
        )
    state = run.state
    load_parameters(state, ckpt)
    load_optimizer(state, ckpt, optimizer_step(ckpt))
    step = own.get("step", ckpt.step)
    if not isinstance(step, int):
        raise ConfigError(f"{source}: does not say how many steps it was trained")
    if own.get("batch") not in (None, run.config.train.batch):
        raise ConfigError(
            f"{source}: was trained with train.batch={own['batch']}; with another the place in the "
            "data is unknown: start from its weights with model.init_from"
        )
    state.step, state.tokens = step, int(own.get("tokens", 0))
    if run.config.train.precision == "fp16" and "loss_scale" in own:
        state.scale.value, state.scale.good = own["loss_scale"]


# -- what lies beside the shards -------------------------------------------------------------------


def _check_formats(run: Run) -> None:
    formats = run.config.save.formats
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(
                f"save.formats: {name!r} is none of {', '.join(FORMATS)}"
                f"{did_you_mean(name, FORMATS)}"
            )
    if "shards" not in formats:
        raise ConfigError('save.formats must have "shards", from which a run resumes')
    if "dcp" in formats and run.config.model.num_experts:
        raise ConfigError(
            'save.formats: "dcp" has no place for single experts; use "shards", and mconv reshard '
            "--to dcp for a checkpoint that needs it"
        )


def _also(run: Run) -> Also:
    """Return what writes the formats beyond shards."""
    formats = run.config.save.formats

    def all_ranks(folder: Path) -> None:
        if "dcp" in formats:
            state_dict_saver.save(_dcp_state(run), checkpoint_id=folder / "dcp")

    def first(folder: Path) -> None:
        if "hf" in formats:
            reshard(folder, folder / "hf", Layout("hf"), with_optimizer=False, verify=False)

    return Also(all_ranks, first)


def _dcp_state(run: Run) -> dict[str, Any]:
    """Return weights and optimizer by name, as ``get_state_dict`` of torch arranges them."""
    names = list(run.state.slots)
    states = {name: dict(run.state.optimizer_state(name)) for name in names}
    return {"model": run.state.parameters(), "optimizer": {"state": states}}


def _assets(run: Run) -> tuple[dict[str, str], tuple[Path, ...]]:
    """Return the texts and files that make the folder a model: config, tokenizer, template."""
    folder = run.config.data.tokenizer
    special: dict[str, int] = {}
    copies: tuple[Path, ...] = ()
    if folder.is_dir():
        tokenizer = load_tokenizer(folder)
        found = {"bos_token_id": tokenizer.bos_id(), "eos_token_id": tokenizer.eos_id()}
        special = {k: v for k, v in found.items() if v >= 0}
        copies = tuple(sorted(p for p in folder.iterdir() if p.is_file() and p.name not in _OURS))
    dtype = next(p for _, p in run.state.all_parameters()).dtype
    config = run.state.parts[0].config.to_hf(**special, dtype=str(dtype).removeprefix("torch."))
    texts = {"config.json": config, "generation_config.json": special}
    return {n: json.dumps(t, indent=2) + "\n" for n, t in texts.items()}, copies
