"""The whole way on one small machine: train sharded, merge, export, quantize, prove.

A tiny Llama learns a bundled text by heart with FSDP2 on a few CPU processes; what comes out is a
sharded checkpoint with its optimizer, a Hugging Face folder, GGUF files and a Modelfile. The run is
an ordinary one: its configuration stays in ``run.toml``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from ...convert.ollama.build import Wishes
from ...errors import ConfigError, OutputError
from ...shardio import open_checkpoint
from ...shardio.report import Inspection, inspect_checkpoint
from ..config import RunConfig, dump_config
from ..launch import launch
from ..metrics import StepMetrics, read_metrics
from ..model_config import ModelConfig
from ..sections import DataConfig, OptimConfig, SaveConfig, ScheduleConfig, TrainConfig
from ..text.token_file import write_tokens
from ..text.tokenizer import encode_documents
from ..text.train_tokenizer import train_tokenizer
from .export import MODELFILE, RECORD, ExportJob, ExportReport, Stage, export
from .proof import Proof

TARGETS = ("F32", "Q8_0", "Q4_K_M")
PROMPT = "The lighthouse at"
_PIECES = 512
_BATCH = 4
_NAME = "lighthouse"
_SAMPLE_TOKENS = 192


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything the demo did.

    Attributes:
        folder: where it lies.
        stages: in order.
        inspection: what ``mconv inspect`` says of the sharded checkpoint.
        metrics: one entry per training step.
        proofs: every claim, proven or not.
        prompt, text: a greedy sample of the trained model.
        files: GGUF name to bytes.
        perplexity: of the trained model and of each GGUF, on the text.
    """

    folder: Path
    stages: tuple[Stage, ...]
    inspection: Inspection
    metrics: tuple[StepMetrics, ...]
    proofs: tuple[Proof, ...]
    prompt: str
    text: str
    files: dict[str, int]
    perplexity: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether every proof holds."""
        return all(proof.ok for proof in self.proofs)


#: What a listener is told of: finished stages, training steps, the sharded checkpoint, proofs.
Event = Stage | StepMetrics | Inspection | Proof
Listener = Callable[[Event], None]


def demo(
    folder: str | Path,
    *,
    steps: int = 100,
    processes: int = 2,
    force: bool = False,
    listener: Listener | None = None,
) -> DemoReport:
    """Train, merge, export, quantize and prove a tiny model.

    Args:
        folder: for everything that is made; new or empty.
        steps: training steps; the text is known by heart after about 80.
        processes: ranks of the sharded training.
        force: replace what an earlier demo left in ``folder``.
        listener: told of progress.

    Raises:
        ConfigError: torch is missing, or the numbers do not fit.
        OutputError: the folder holds something else.
        TrainError: a rank failed.
    """
    if find_spec("torch") is None:
        raise ConfigError("training needs torch: pip install 'mconv[train]'")
    return _Demo(Path(folder).resolve(), listener or (lambda _: None)).run(steps, processes, force)


def documents() -> list[str]:
    """Return the bundled text: paragraphs about four lighthouses."""
    text = (files(__package__) / "texts" / "lighthouses.txt").read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n")]


class _Demo:
    """The stages, one method each, over the folders they share."""

    def __init__(self, folder: Path, listener: Listener) -> None:
        self.folder = folder
        self.tell = listener
        self.config = folder / "run.toml"
        self.tokens = folder / "tokens.npy"
        self.tokenizer = folder / "tokenizer"
        self.logs = folder / "run"
        made = (self.config, self.tokens, self.tokenizer, self.logs)
        ggufs = (f"{_NAME}-{kind}.gguf" for kind in TARGETS)
        self.made = {MODELFILE, RECORD, "merged", *ggufs, *(path.name for path in made)}
        self.stages: list[Stage] = []
        self._since = time.monotonic()

    def run(self, steps: int, processes: int, force: bool) -> DemoReport:
        config = self._config(steps, processes)
        self._clear(force)
        self.config.write_text(dump_config(config, self.folder), encoding="utf-8")
        self._tokenize(config)
        shards = self._train(config, processes)
        inspection = inspect_checkpoint(open_checkpoint(shards))
        self.tell(inspection)
        made = self._export(config, shards)
        return DemoReport(
            self.folder,
            (*self.stages, *made.stages),
            inspection,
            tuple(read_metrics(self.logs)),
            made.proofs,
            PROMPT,
            made.text,
            made.files,
            made.perplexity,
        )

    def _config(self, steps: int, processes: int) -> RunConfig:
        batch = -(-_BATCH // processes) * processes  # the next multiple
        return RunConfig(
            model=ModelConfig(
                vocab_size=_PIECES,
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
            ),
            train=TrainConfig(steps=steps, seq_len=256, batch=batch, threads=1),
            optim=OptimConfig(lr=2e-3),
            schedule=ScheduleConfig(warmup=10),
            data=DataConfig(tokens=self.tokens, tokenizer=self.tokenizer),
            save=SaveConfig(folder=self.logs),
        )

    def _clear(self, force: bool) -> None:
        """Make the folder, or empty that of an earlier demo."""
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder}: is a file; choose another folder with --dir")
        there = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        if there and not {self.config.name} <= set(there) <= self.made:
            raise OutputError(
                f"{self.folder}: holds other things than a demo; choose another folder with --dir"
            )
        if there and not force:
            raise OutputError(
                f"{self.folder}: holds an earlier demo; replace it with --force, or choose another "
                "folder with --dir"
            )
        if there:
            shutil.rmtree(self.folder)
        self.logs.mkdir(parents=True)

    def _tokenize(self, config: RunConfig) -> None:
        texts = documents()
        train_tokenizer(texts, self.tokenizer, _PIECES)
        tokens = encode_documents(texts, self.tokenizer)
        write_tokens(config.data.tokens, tokens)
        self._done("tokenizer", f"{_PIECES} pieces from {len(texts)} texts, {len(tokens)} tokens")

    def _train(self, config: RunConfig, processes: int) -> Path:
        """Train, telling of every step as its metrics appear."""
        from ..checkpoint import step_folder

        told = 0

        def follow() -> None:
            nonlocal told
            for metrics in read_metrics(self.logs)[told:]:
                self.tell(metrics)
                told += 1

        launch(self.config, self.logs, processes, follow)
        first, last = (read_metrics(self.logs)[i].loss for i in (0, -1))
        self._done(
            "train",
            f"{config.train.steps} steps on {processes} processes, loss {first:.2f} -> {last:.3f}",
        )
        return step_folder(self.logs, config.train.steps)

    def _export(self, config: RunConfig, shards: Path) -> ExportReport:
        job = ExportJob(
            checkpoint=shards,
            folder=self.folder,
            config=config,
            types=TARGETS,
            name=_NAME,
            prompt=PROMPT,
            wishes=Wishes(source="", context=0, parameters={"temperature": 0.0}),
            sample_tokens=_SAMPLE_TOKENS,
        )
        return export(job, self.tell)

    def _done(self, name: str, detail: str) -> None:
        now = time.monotonic()
        self.stages.append(Stage(name, detail, now - self._since))
        self._since = now
        self.tell(self.stages[-1])
