"""From a run's checkpoint to models that run: merge, GGUF files, Modelfile, and proof of it all.

Every stage leaves files and a line in ``export.json``; a stage whose files come from this very
checkpoint is not done again, so an interrupted export goes on where it was. Perplexities are
measured with the trained model's own arithmetic on the weights that each GGUF file really holds.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import zlib
from collections.abc import Callable
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
from ..checkpoint import MANIFEST, step_folder
from ..settings import RunConfig
from .proof import (
    Proof,
    gguf_equals_model,
    llamacpp_says_the_same,
    load_model,
    merged_equals_shards,
    merged_equals_torch,
)

RECORD = "export.json"
MODELFILE = "Modelfile"
_EXACT = ("F32", "F16", "BF16")
_SMALL_LOSS = {"F32": 1e-3, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 1e-2}  # of the perplexity


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage: what was made, and how long it took."""

    name: str
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What shall be made of a finished run."""

    config: RunConfig
    types: tuple[str, ...]  # of GGUF; the Modelfile is for the first quantized one
    folder: Path | None = None  # for everything that is made; None: export in the run's folder
    name: str = ""  # of the files; empty: that of the run's folder
    wishes: Wishes = field(default_factory=lambda: Wishes(source=""))  # for the Modelfile


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was made, and the perplexity of the trained model (``torch``) and of each GGUF file."""

    folder: Path
    files: dict[str, int]  # GGUF file name to bytes
    stages: tuple[Stage, ...]
    proofs: tuple[Proof, ...]
    perplexity: dict[str, float]
    text: str  # a greedy sample after eval.prompt

    @property
    def ok(self) -> bool:
        """Whether every proof holds."""
        return all(proof.ok for proof in self.proofs)


def export(job: ExportJob, tell: Callable[[Stage | Proof], None]) -> ExportReport:
    """Make everything of a job, and prove it; ``tell`` is told of every stage and proof.

    Raises:
        MconvError: the checkpoint or a target cannot be used.
    """
    return _Export(job, tell).run()


class _Export:
    """The stages, one method each."""

    def __init__(self, job: ExportJob, tell: Callable[[Stage | Proof], None]) -> None:
        self.config, self.wishes, self.tell = job.config, job.wishes, tell
        run = job.config.save.folder
        self.checkpoint = step_folder(run, job.config.train.steps)
        self.adapter = run / "adapter" if job.config.lora.rank else None
        self.imatrix = run / "imatrix.gguf"
        usual = re.sub(r"[^A-Za-z0-9._-]+", "-", run.resolve().name).strip("-.") or "model"
        self.name, self.folder = job.name or usual, job.folder or run / "export"
        self.merged = self.folder / "merged"
        self.ggufs = {t: self.folder / f"{self.name}-{t}.gguf" for t in job.types}
        self.stages: list[Stage] = []
        self.proofs: list[Proof] = []
        self.perplexity: dict[str, float] = {}
        self._since = time.monotonic()
        self._record = self._read_record()

    def run(self) -> ExportReport:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stage("merge", self.merged, self._merge)
        for kind, path in self.ggufs.items():
            self._stage(f"to-gguf {kind}", path, partial(self._gguf, kind))
        self._stage(MODELFILE, self.folder / MODELFILE, self._modelfile)
        text = self._prove()
        files = {p.name: p.stat().st_size for p in self.ggufs.values()}
        stages, proofs = tuple(self.stages), tuple(self.proofs)
        return ExportReport(self.folder, files, stages, proofs, self.perplexity, text)

    # -- stages ------------------------------------------------------------------------------------

    def _merge(self) -> str:
        report = reshard(self._source(), self.merged, with_optimizer=False, force=True)
        return f"{report.parameters:,} parameters in {report.tensors} tensors, safetensors"

    def _source(self) -> Checkpoint:
        """The checkpoint, with the adapter of a LoRA run merged in."""
        ckpt = open_checkpoint(self.checkpoint)
        if self.adapter is None:
            return ckpt
        base = {n: t for n, t in ckpt.weights.items() if ".lora_" not in n}
        return merge_adapter(replace(ckpt, weights=base, optimizer={}), self.adapter)

    def _gguf(self, kind: str) -> str:
        options = QuantizeOptions(imatrix=self.imatrix if self.imatrix.is_file() else None)
        out = self.ggufs[kind]
        name = self.name.capitalize()
        to_gguf(self.merged, out, kind, name=name, quantization=options, force=True)
        return f"{out.name}, {out.stat().st_size / 1e6:,.1f} MB"

    def _modelfile(self) -> str:
        served = next((t for t in self.ggufs if t not in _EXACT), next(iter(self.ggufs)))
        wishes = replace(self.wishes, source=f"./{self.ggufs[served].name}")
        text = emit(make_modelfile(facts_of(self.ggufs[served]), wishes).modelfile)
        (self.folder / MODELFILE).write_text(text, encoding="utf-8")
        return f"FROM {wishes.source}"

    # -- proof -------------------------------------------------------------------------------------

    def _prove(self) -> str:
        """Prove everything; return a sample."""
        if self.adapter is None:
            self._proven(merged_equals_shards(self.merged, self.checkpoint))
        if self.adapter is None and not self.config.model.num_experts:
            # torch's reader fills parameters as they are named: not stacks of experts
            self._proven(merged_equals_torch(self.merged, load_model(self.checkpoint)))
        for path in self.ggufs.values():
            self._proven(gguf_equals_model(path, self.merged))
        self._measure()
        text = self._sample() if self.config.eval.prompt else ""
        detail = f"{sum(p.ok for p in self.proofs)} of {len(self.proofs)} proofs hold"
        if not have_llamacpp():
            detail += "; llama.cpp was not asked (pip install xllamacpp to do so)"
        self._done("prove", detail)
        return text

    def _measure(self) -> None:
        """Perplexity of the trained weights and of those in each GGUF file."""
        from ..measure.perplexity import perplexities

        self.perplexity = perplexities(self.config, {"torch": self.merged, **self.ggufs})
        exact = self.perplexity["torch"]
        rest = []
        for kind, path in self.ggufs.items():
            found = self.perplexity[kind]
            off = found / exact - 1
            if kind in _SMALL_LOSS:
                claim = f"{path.name} has the perplexity of the trained model"
                detail = f"{found:.4f}, trained {exact:.4f} ({off:+.2%})"
                self._proven(Proof(claim, abs(off) <= _SMALL_LOSS[kind], detail))
            else:
                rest.append(f"{kind} {found:.4f} ({off:+.2%})")
        if rest:
            self._done("perplexity", f"trained {exact:.4f}, {', '.join(rest)}")

    def _sample(self) -> str:
        """Continue the prompt with torch, and the exact file with llama.cpp."""
        from ..measure.perplexity import decoder_of
        from ..measure.sample import greedy, one_thread
        from ..text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.config.data.tokenizer)
        prompt = tokenizer.encode(self.config.eval.prompt, add_bos=True)
        count, stop = self.config.eval.sample_tokens, tokenizer.eos_id()
        with one_thread():
            said = greedy(decoder_of(self.merged, self.config.model), prompt, count, stop)
        if "F32" in self.ggufs and have_llamacpp():
            self._proven(llamacpp_says_the_same(self.ggufs["F32"], prompt, *said, count, stop))
        return str(tokenizer.decode([*prompt, *said[0]]))

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
        path = self.folder / RECORD
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        self._done(name, done[name])

    def _read_record(self) -> dict[str, Any]:
        """What was done with this very checkpoint, adapter and importance matrix."""
        adapter = sorted(self.adapter.iterdir()) if self.adapter is not None else []
        crc = 0
        for path in (self.checkpoint / MANIFEST, *adapter, self.imatrix):
            crc = zlib.crc32(path.read_bytes() if path.is_file() else b"", crc)
        fresh = {"source": f"{self.checkpoint.name}:{crc:08x}", "done": {}}
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return fresh
        same = isinstance(record, dict) and record.get("source") == fresh["source"]
        return record if same and isinstance(record.get("done"), dict) else fresh

    def _done(self, name: str, detail: str) -> None:
        now = time.monotonic()
        self.stages.append(Stage(name, detail, now - self._since))
        self._since = now
        self.tell(self.stages[-1])

    def _proven(self, proof: Proof) -> None:
        self.proofs.append(proof)
        self.tell(proof)
