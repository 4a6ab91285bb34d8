"""The whole way on one small machine: train sharded, merge, export, quantize, prove.

A tiny Llama learns a bundled text by heart with FSDP2 on a few CPU processes; what comes out is a
sharded checkpoint with its optimizer, a Hugging Face folder, GGUF files and a Modelfile. The run is
an ordinary one: its configuration stays in ``run.toml``.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from ...convert.ollama.build import Wishes
from ...errors import ConfigError, OutputError
from ...shardio.report import Inspection
from ..metrics import StepMetrics, read_metrics
from ..settings import RunConfig, load_config
from ..text.token_file import write_tokens
from ..text.tokenizer import encode_documents
from ..text.train_tokenizer import train_tokenizer
from .export import MODELFILE, RECORD, ExportJob, Stage
from .pipeline_run import Listener, run_pipeline
from .proof import Proof

TARGETS = ("F32", "Q8_0", "Q4_K_M")
_PIECES = 512
_BATCH = 4
_NAME = "lighthouse"
_MADE = {"run.toml", "tokens.npy", "tokenizer", "run", "merged", MODELFILE, RECORD}
_MADE |= {f"{_NAME}-{kind}.gguf" for kind in TARGETS}


_RUN = """\
[model]
vocab_size = {pieces}
hidden_size = 256
intermediate_size = 768
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 256

[train]
steps = {steps}
seq_len = 256
batch = {batch}
threads = 1

[optim]
lr = 2e-3

[schedule]
warmup = 10

[data]
tokens = "tokens.npy"
tokenizer = "tokenizer"

[save]
folder = "run"

[eval]
prompt = "The lighthouse at"
sample_tokens = 192
"""


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything the demo did."""

    folder: Path
    stages: tuple[Stage, ...]
    inspection: Inspection  # what mconv inspect says of the sharded checkpoint
    metrics: tuple[StepMetrics, ...]  # one entry per training step
    proofs: tuple[Proof, ...]
    prompt: str
    text: str  # a greedy sample of the trained model
    files: dict[str, int]  # GGUF name to bytes
    perplexity: dict[str, float]  # of the trained model and of each GGUF, on the text

    @property
    def ok(self) -> bool:
        """Whether every proof holds."""
        return all(proof.ok for proof in self.proofs)


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
    folder = Path(folder).resolve()
    run = folder / "run.toml"
    _clear(folder, force)
    batch = -(-_BATCH // processes) * processes  # the next multiple
    run.write_text(_RUN.format(pieces=_PIECES, steps=steps, batch=batch), encoding="utf-8")
    config = load_config(run)
    stages: list[Stage] = []
    inspected: list[Inspection] = []

    def tell(event: Stage | StepMetrics | Inspection | Proof) -> None:
        if isinstance(event, Stage):
            stages.append(event)
        elif isinstance(event, Inspection):
            inspected.append(event)
        if listener is not None:
            listener(event)

    tell(_tokenize(config))
    wishes = Wishes(source="", context=0, parameters={"temperature": 0.0})
    job = ExportJob(config=config, types=TARGETS, folder=folder, name=_NAME, wishes=wishes)
    made = run_pipeline(run, job, (), processes, tell)
    return DemoReport(
        folder,
        tuple(stages),
        inspected[0],
        tuple(read_metrics(config.save.folder)),
        made.proofs,
        config.eval.prompt,
        made.text,
        made.files,
        made.perplexity,
    )


def documents() -> list[str]:
    """Return the bundled text: paragraphs about four lighthouses."""
    text = (files(__package__) / "texts" / "lighthouses.txt").read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n")]


def _clear(folder: Path, force: bool) -> None:
    """Make the folder, or empty that of an earlier demo."""
    other = "choose another folder with --dir"
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; {other}")
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if there and not {"run.toml"} <= there <= _MADE:
        raise OutputError(f"{folder}: holds other things than a demo; {other}")
    if there and not force:
        raise OutputError(f"{folder}: holds an earlier demo; replace it with --force, or {other}")
    if there:
        shutil.rmtree(folder)
    (folder / "run").mkdir(parents=True)


def _tokenize(config: RunConfig) -> Stage:
    started, texts = time.monotonic(), documents()
    train_tokenizer(texts, config.data.tokenizer, _PIECES)
    tokens = encode_documents(texts, config.data.tokenizer)
    write_tokens(config.data.tokens, tokens)
    detail = f"{_PIECES} pieces from {len(texts)} texts, {len(tokens)} tokens"
    return Stage("tokenizer", detail, time.monotonic() - started)
