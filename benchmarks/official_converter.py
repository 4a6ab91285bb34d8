"""Run llama.cpp's own converter on a model folder, as an oracle for tests and benchmarks.

Three things stand in the way of tiny models and are gone around: it knows a pre-tokenizer by a hash
over the whole vocabulary, which a cut-down vocabulary does not have, it takes some settings only
under names that newer versions of transformers no longer keep, and for Baichuan it calls itself
without end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_DRIVER = """
import json, sys
root, pre, keep = sys.argv[1:4]
sys.path[:0] = [root, root + "/gguf-py"]
import conversion.base as base
if pre:
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
loader = base.ModelBase.load_hparams
def load(dir_model, is_mistral_format):
    found = loader(dir_model, is_mistral_format)
    raw = json.load(open(dir_model / "config.json"))
    if keep == "*":
        return raw
    return {**found, **{k: raw[k] for k in keep.split(",") if k in raw}}
base.ModelBase.load_hparams = staticmethod(load)
import conversion.baichuan as baichuan
convert_baichuan = baichuan.BaichuanModel.modify_tensors
def modify_baichuan(self, data, name, bid):
    modify = convert_baichuan if "W_pack" in name else base.TextModel.modify_tensors
    return modify(self, data, name, bid)
baichuan.BaichuanModel.modify_tensors = modify_baichuan
__file__ = root + "/convert_hf_to_gguf.py"
sys.argv = [__file__, *sys.argv[4:]]
exec(compile(open(__file__).read(), __file__, "exec"))
"""


class OfficialError(Exception):
    """The other program failed; the text is the end of what it said."""


def official_convert(
    source: Path, folder: Path, out: Path, kind: str, pre: str = "", keep: Sequence[str] = ()
) -> None:
    """Convert a folder.

    Args:
        source: llama.cpp's source folder.
        folder: the model.
        out: the GGUF to write.
        kind: f32, f16, bf16, q8_0 or auto.
        pre: pre-tokenizer name, instead of the recognized one.
        keep: entries of config.json to take as they are; ``*``: nothing but these.
    """
    arguments = [str(source), pre, ",".join(keep), str(folder), "--outfile", str(out)]
    _run([sys.executable, "-c", _DRIVER, *arguments, "--outtype", kind])


def official_quantize(program: Path, source: Path, out: Path, kind: str) -> None:
    """Quantize a GGUF with llama-quantize."""
    _run([str(program), str(source), str(out), kind, "2"])


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, check=False, env=dict(os.environ))
    if run.returncode:
        raise OfficialError(run.stderr.decode(errors="replace")[-2000:])
