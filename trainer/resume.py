"""The hook that saves a run and resumes it, and where a resumed run starts.

``auto`` takes the newest whole checkpoint of the run's folder; a path may be a checkpoint of any
format and layout with its optimizer. The order of the data is a function of the step
(``data.py``), so nothing of it is saved but a fingerprint, which must not change.
"""

from __future__ import annotations

import logging
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver

from ..convert.naming import to_hf
from ..convert.reshard import reshard
from ..errors import ConfigError
from ..shardio import Layout, open_checkpoint
from ..shardio.training_state import optimizer_step
from .checkpoint import MANIFEST, Saver, newest
from .hooks import Hook, Run
from .metrics import StepMetrics
from .text.tokenizer import load_tokenizer
from .training_state import as_json, content_of, load_optimizer, load_parameters, read_own

_log = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Resumes at the start, saves every so many steps and at the end, also when told to end."""

    def __init__(self) -> None:
        self._saver: Saver | None = None
        self._saved = -1
        self._asked = False

    def start(self, run: Run) -> None:
        self._listen()
        self._saver = Saver(run.config.save)
        wish = run.config.save.resume
        source, notes = newest(run.config.save.folder) if wish == "auto" else (Path(wish), [])
        for note in notes if run.first else ():
            _log.warning("passed over: %s", note)
        if wish == "none" or source is None:
            return
        if not source.exists():
            raise ConfigError(f"save.resume={wish}: no such file or folder")
        restore(run, source)
        self._saved = run.state.step

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
        self._saved, formats = run.state.step, run.config.save.formats
        own = {"data": run.data.fingerprint(), "batch": run.config.train.batch}
        content = content_of(run.state, own, _model_files(run) if run.first else {})

        def dcp(folder: Path) -> None:
            state_dict_saver.save(_dcp_state(run), checkpoint_id=folder / "dcp")

        def merged(folder: Path) -> None:
            reshard(folder, folder / "hf", Layout("hf"), with_optimizer=False, verify=False)

        if "dcp" in formats:
            content = replace(content, on_all=dcp)
        if "hf" in formats:
            content = replace(content, on_first=merged)
        return self._saver.save(run.state.step, content)


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


def _dcp_state(run: Run) -> dict[str, Any]:
    """Return weights and optimizer by name, as ``get_state_dict`` of torch arranges them."""
    states = {name: dict(found) for name, found in run.state.optimizer_states().items()}
    return {"model": run.state.parameters(), "optimizer": {"state": states}}


def _model_files(run: Run) -> dict[str, bytes]:
    """Return what makes the folder a model: config, tokenizer, chat template."""
    folder = run.config.data.tokenizer
    special: dict[str, int] = {}
    files: dict[str, bytes] = {}
    if folder.is_dir():
        tokenizer = load_tokenizer(folder)
        found = {"bos_token_id": tokenizer.bos_id(), "eos_token_id": tokenizer.eos_id()}
        special = {k: v for k, v in found.items() if v >= 0}
        files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
        files.pop(MANIFEST, None)
    dtype = str(next(p for _, p in run.state.all_parameters()).dtype).removeprefix("torch.")
    config = run.state.parts[0].config.to_hf(**special, dtype=dtype)
    return {**files, "config.json": as_json(config), "generation_config.json": as_json(special)}
