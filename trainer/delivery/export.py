"""From a run's checkpoint to models that run: merge, GGUF files, Modelfile, and proof of it all.

Every stage leaves files and a line in ``export.json``; a stage whose files come from this very
checkpoint is not done again, so an interrupted export goes on where it was. Perplexities are
measured with the trained model's own arithmetic on the weights that each GGUF file really holds.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...convert.llamacpp import have_llamacpp
from ...convert.ollama.build import Wishes, make_modelfile
from ...convert.ollama.facts import facts_of
from ...convert.ollama.modelfile_values import emit
from ...convert.quantize import QuantizeOptions
from ...convert.reshard import reshard
from ...convert.to_gguf import to_gguf
from ...shardio import Checkpoint, open_checkpoint
from ...shardio.peft import merge_adapter
from ..checkpoint import MANIFEST
from ..config import RunConfig
from .proof import (
    Proof,
    gguf_equals_model,
    llamacpp_says_the_same,
    load_model,
    merged_equals_shards,
    merged_equals_torch,
)

RECORD = "export.json"
ADAPTER = "adapter"
MODELFILE = "Modelfile"
_IMATRIX = "imatrix.gguf"
_EXACT = ("F32", "F16", "BF16")
_SMALL_LOSS = {"F32": 1e-3, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 1e-2}  # of the perplexity


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage: what was made, and how long it took."""

    name: str
    detail: str
    seconds: float


#: Is told of every stage and proof.
Listener = Callable[[Stage | Proof], None]


@dataclass(frozen=True, slots=True)
class ExportJob:
    """What shall be made of a checkpoint.

    Attributes:
        checkpoint: of the run, shards.
        folder: for everything that is made.
        config: of the run.
        types: GGUF targets, the first one is what the Modelfile is for.
        name: of the files.
        prompt: what llama.cpp and torch continue; empty for none.
        wishes: for the Modelfile.
        sample_tokens: to generate.
    """

    checkpoint: Path
    folder: Path
    config: RunConfig
    types: tuple[str, ...]
    name: str
    prompt: str = ""
    wishes: Wishes = field(default_factory=lambda: Wishes(source=""))
    sample_tokens: int = 64


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was made.

    Attributes:
        folder: where.
        files: GGUF file name to bytes.
        stages, proofs: in order.
        perplexity: of the trained model (``torch``) and of each GGUF file on the run's data.
        text: a greedy sample after the prompt.
    """

    folder: Path
    files: dict[str, int]
    stages: tuple[Stage, ...]
    proofs: tuple[Proof, ...]
    perplexity: dict[str, float]
    text: str

    @property
    def ok(self) -> bool:
        """Whether every proof holds."""
        return all(proof.ok for proof in self.proofs)


def export(job: ExportJob, tell: Listener) -> ExportReport:
    """Make everything of a job, and prove it.

    Raises:
        MconvError: the checkpoint or a target cannot be used.
    """
    return _Export(job, tell).run()


class _Export:
    """The stages, one method each."""

    def __init__(self, job: ExportJob, tell: Listener) -> None:
        self.job, self.tell = job, tell
        self.merged = job.folder / "merged"
        self.ggufs = {t: job.folder / f"{job.name}-{t}.gguf" for t in job.types}
        self.stages: list[Stage] = []
        self.proofs: list[Proof] = []
        self.perplexity: dict[str, float] = {}
        self.adapter = job.config.save.folder / ADAPTER if job.config.lora.rank else None
        self._since = time.monotonic()
        self._record = self._read_record()

    def run(self) -> ExportReport:
        self.job.folder.mkdir(parents=True, exist_ok=True)
        self._stage("merge", self.merged, self._merge)
        for kind, path in self.ggufs.items():
            self._stage(f"to-gguf {kind}", path, partial(self._gguf, kind))
        self._stage(MODELFILE, self.job.folder / MODELFILE, self._modelfile)
        text = self._prove()
        files = {p.name: p.stat().st_size for p in self.ggufs.values()}
        stages, proofs = tuple(self.stages), tuple(self.proofs)
        return ExportReport(self.job.folder, files, stages, proofs, self.perplexity, text)

    # -- stages ------------------------------------------------------------------------------------

    def _merge(self) -> str:
        report = reshard(self._source(), self.merged, with_optimizer=False, force=True)
        return f"{report.parameters:,} parameters in {report.tensors} tensors, safetensors"

    def _source(self) -> Checkpoint:
        """The checkpoint, with the adapter of a LoRA run merged in."""
        ckpt = open_checkpoint(self.job.checkpoint)
        if self.adapter is None:
            return ckpt
        base = {n: t for n, t in ckpt.weights.items() if ".lora_" not in n}
        return merge_adapter(replace(ckpt, weights=base, optimizer={}), self.adapter)

    def _gguf(self, kind: str) -> str:
        measured = self.job.config.save.folder / _IMATRIX
        options = QuantizeOptions(imatrix=measured if measured.is_file() else None)
        out = self.ggufs[kind]
        to_gguf(self.merged, out, kind, name=self.job.name.capitalize(), quantization=options,
                force=True)  # fmt: skip
        return f"{out.name}, {out.stat().st_size / 1e6:,.1f} MB"

    def _modelfile(self) -> str:
        first = self.ggufs[self._served()]
        wishes = replace(self.job.wishes, source=f"./{first.name}")
        text = emit(make_modelfile(facts_of(first), wishes).modelfile)
        (self.job.folder / MODELFILE).write_text(text, encoding="utf-8")
        return f"FROM ./{first.name}"

    def _served(self) -> str:
        """The type that the Modelfile names: the first that is quantized, else the first."""
        return next((t for t in self.job.types if t not in _EXACT), self.job.types[0])

    # -- proof -------------------------------------------------------------------------------------

    def _prove(self) -> str:
        from ..measure.sample import greedy
        from ..mesh import one_thread
        from ..text.tokenizer import load_tokenizer

        model = None
        if self.adapter is None:
            self._proven(merged_equals_shards(self.merged, self.job.checkpoint))
        if self.adapter is None and not self.job.config.model.num_experts:
            # torch's reader fills parameters as they are named: not stacks of experts
            model = load_model(self.job.checkpoint)
            self._proven(merged_equals_torch(self.merged, model))
        for path in self.ggufs.values():
            self._proven(gguf_equals_model(path, self.merged))
        self._measure()
        text = ""
        if self.job.prompt:
            from ..measure.perplexity import decoder_of

            model = model or decoder_of(self.merged, self.job.config.model)
            tokenizer = load_tokenizer(self.job.config.data.tokenizer)
            prompt, stop = tokenizer.encode(self.job.prompt, add_bos=True), tokenizer.eos_id()
            count = self.job.sample_tokens
            with one_thread():
                said = greedy(model, prompt, count, stop)
            text = str(tokenizer.decode([*prompt, *said[0]]))
            if "F32" in self.ggufs and have_llamacpp():
                proof = llamacpp_says_the_same(self.ggufs["F32"], prompt, *said, count, stop)
                self._proven(proof)
        detail = f"{sum(p.ok for p in self.proofs)} of {len(self.proofs)} proofs hold"
        if not have_llamacpp():
            detail += "; llama.cpp was not asked (pip install xllamacpp to do so)"
        self._done("prove", detail)
        return text

    def _measure(self) -> None:
        """Perplexity of the trained weights and of those in each GGUF file."""
        from ..measure.perplexity import perplexities

        sources = {"torch": self.merged, **self.ggufs}
        self.perplexity = perplexities(self.job.config, sources)
        exact = self.perplexity["torch"]
        for kind, limit in _SMALL_LOSS.items():
            if kind in self.perplexity:
                off = self.perplexity[kind] / exact - 1
                claim = f"{self.ggufs[kind].name} has the perplexity of the trained model"
                detail = f"{self.perplexity[kind]:.4f}, trained {exact:.4f} ({off:+.2%})"
                self._proven(Proof(claim, abs(off) <= limit, detail))
        rest = {k: v for k, v in self.perplexity.items() if k not in (*_SMALL_LOSS, "torch")}
        if rest:
            told = ", ".join(f"{k} {v:.4f} ({v / exact - 1:+.2%})" for k, v in rest.items())
            self._done("perplexity", f"trained {exact:.4f}, {told}")

    # -- the record --------------------------------------------------------------------------------

    def _stage(self, name: str, made: Path, do: Callable[[], str]) -> None:
        """Do a stage, unless its files are there and come from this checkpoint."""
        done = self._record["done"]
        if name in done and made.exists():
            self._done(name, f"{done[name]} (there already)")
            return
        if made.is_dir():
            shutil.rmtree(made)
        done[name] = do()
        path = self.job.folder / RECORD
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        self._done(name, done[name])

    def _read_record(self) -> dict[str, Any]:
        fresh = {"source": self._identity(), "done": {}}
        try:
            record = json.loads((self.job.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return fresh
        same = isinstance(record, dict) and record.get("source") == fresh["source"]
        return record if same and isinstance(record.get("done"), dict) else fresh

    def _identity(self) -> str:
        """What changes when the checkpoint, the adapter or the importance matrix does."""
        files: Sequence[Path] = [self.job.checkpoint / MANIFEST]
        if self.adapter is not None:
            files = [*files, *sorted(p for p in self.adapter.iterdir() if p.is_file())]
        files = [*files, self.job.config.save.folder / _IMATRIX]
        crc = 0
        for path in files:
            crc = zlib.crc32(path.read_bytes() if path.is_file() else b"", crc)
        return f"{self.job.checkpoint.name}:{crc:08x}"

    def _done(self, name: str, detail: str) -> None:
        now = time.monotonic()
        self.stages.append(Stage(name, detail, now - self._since))
        self._since = now
        self.tell(self.stages[-1])

    def _proven(self, proof: Proof) -> None:
        self.proofs.append(proof)
        self.tell(proof)
