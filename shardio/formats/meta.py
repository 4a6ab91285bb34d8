"""Meta's ``consolidated.NN.pth``: Llama 1 to 3, one file per tensor-parallel rank.

Each file is a flat ``torch.save`` dict with the same names; ``params.json`` lies beside them. Rows
of ``wq wk wv w1 w3 output`` and columns of ``wo w2`` are cut, norms and ``rope.freqs`` repeated.
Token embeddings are cut by columns in Llama 1 and 2 and by rows in Llama 3, which their shape
tells. With fewer key/value heads than files, neighbours hold the same heads. Source: Meta's
``llama`` and ``llama-models`` (fairscale's parallel layers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FormatError, LayoutError, UnsupportedError
from ..assets import load_json
from ..checkpoint import Checkpoint
from ..coverage import prove
from ..hf_files import file_sets
from ..layout import Layout
from ..placement import Placement, Shard
from ..records import StoredTensor
from ..registry import Format, OpenOptions
from ..state_checkpoint import model_files
from ..stored import lazy
from ..tensor import LazyTensor
from ..torchfile import TorchFile, open_torch_file

PARAMS = "params.json"
_FILE = re.compile(r"^consolidated\.(\d{2})\.pth$")
_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
_COLUMNS = ("wo", "w2")
_KV = ("wk", "wv")
_THREADS = 8


def detect(path: Path) -> Path | None:
    """Return the folder, unless it holds the same model in Hugging Face files as well."""
    if path.is_file():
        return path.parent if _FILE.match(path.name) else None
    try:
        found = any(_FILE.match(p.name) for p in path.iterdir())
    except OSError:
        return None
    return path if found and not any(s.usual for s in file_sets(path)) else None


def open_meta(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a folder of ``consolidated.NN.pth``.

    Raises:
        FormatError: files missing, damaged or swapped.
        LayoutError: parts that do not fit each other or ``params.json``.
        UnsupportedError: tensors whose cut is not known (Llama 4's fused experts).
    """
    files = _files(root)
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = [_state(f) for f in pool.map(open_torch_file, files)]
    _check_names(files, parts)
    params = _params(root)
    rule = _Cuts(root, len(files), _dim(root, parts[0]), params)
    weights: dict[str, LazyTensor] = {}
    placements: dict[str, Mapping[str, Placement]] = {}
    replicas: dict[str, tuple[LazyTensor, ...]] = {}
    for name in parts[0]:
        pieces = [lazy(p[name]) for p in parts]
        dim = rule.dim_of(name, pieces[0])
        kept, *copies = [_joined(root, name, c, dim) for c in rule.copies(name, pieces, dim)]
        weights[name] = kept
        if dim is not None and len(pieces) > 1:
            placements[name] = {"tp": Shard(dim, even=True)}
        if copies:
            replicas[name] = tuple(copies)
    rule.check(weights)
    prove(weights, root)
    config, assets = model_files(root, options)
    return Checkpoint(
        path=root,
        format="meta",
        naming="meta",
        weights=weights,
        config=config,
        args=params,
        layout=Layout(format="meta", tp=len(files)),
        placements=placements,
        replicas=replicas,
        assets=assets,
        warnings=() if params else (f"no {PARAMS} beside the files: give the model's --config",),
    )


def _files(root: Path) -> list[Path]:
    found = {int(m[1]): p for p in root.iterdir() if (m := _FILE.match(p.name))}
    missing = [i for i in range(max(found) + 1) if i not in found]
    if missing:
        listed = ", ".join(f"consolidated.{i:02d}.pth" for i in missing)
        raise FormatError(f"{root}: {len(found)} of {max(found) + 1} files are there: {listed}")
    return [found[i] for i in sorted(found)]


def _state(file: TorchFile) -> dict[str, StoredTensor]:
    """Return the tensors of one file; torch keeps the name a file was saved under."""
    saved = _FILE.match(f"{file.archive}.pth")
    if saved and _FILE.match(file.path.name) and f"{file.archive}.pth" != file.path.name:
        raise FormatError(
            f"{file.path}: was saved as {file.archive}.pth: the files were swapped or renamed"
        )
    if not isinstance(file.root, dict):
        raise FormatError(f"{file.path}: holds no state dict but a {type(file.root).__name__}")
    found = {str(k): v for k, v in file.root.items() if isinstance(v, StoredTensor)}
    if not found or len(found) != len(file.root):
        raise FormatError(f"{file.path}: {len(file.root) - len(found)} entries are no tensors")
    return found


def _check_names(files: Sequence[Path], parts: Sequence[Mapping[str, StoredTensor]]) -> None:
    for path, part in zip(files[1:], parts[1:], strict=True):
        odd = sorted(set(part) ^ set(parts[0]))
        if odd:
            raise FormatError(
                f"{path}: {odd[0]!r} is not in this file and {files[0].name} alike "
                f"({len(odd)} such names): they belong to different models"
            )
        for name, tensor in part.items():
            if tensor.dtype != parts[0][name].dtype:
                raise FormatError(
                    f"{path}: {name!r} is {tensor.dtype}, in {files[0].name} "
                    f"{parts[0][name].dtype}: they belong to different saves"
                )


def _params(root: Path) -> dict[str, Any]:
    path = root / PARAMS
    if not path.is_file():
        return {}
    params = load_json(path)
    if not isinstance(params, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return params


def _dim(root: Path, part: Mapping[str, StoredTensor]) -> int:
    norm = part.get("norm.weight")
    if norm is None or len(norm.shape) != 1:
        raise FormatError(f"{root}: holds no norm.weight: not a Llama model in Meta's files")
    return int(norm.shape[0])


def _joined(root: Path, name: str, pieces: Sequence[LazyTensor], dim: int | None) -> LazyTensor:
    if dim is None:
        return pieces[0]
    try:
        return Shard(dim).assemble(pieces)
    except ValueError as e:
        raise LayoutError(f"{root}: {name!r}: the parts do not fit: {e}") from e


@dataclass(frozen=True, slots=True)
class _Cuts:
    """How the tensors of a model are spread over ``world`` files.

    Attributes:
        dim: the model's width.
        params: ``params.json``, or empty.
    """

    root: Path
    world: int
    dim: int
    params: Mapping[str, Any]

    def dim_of(self, name: str, piece: LazyTensor) -> int | None:
        """Return the dim a tensor is cut on; None where it is repeated."""
        kind = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if kind.endswith("norm") or name == "rope.freqs" or self.world == 1:
            return None
        if kind in _ROWS:
            return 0
        if kind in _COLUMNS:
            return None if name.endswith(".bias") else 1
        if kind == "tok_embeddings" and piece.ndim == 2:
            return 0 if piece.shape[1] == self.dim else 1
        raise UnsupportedError(
            f"{self.root}: how {name!r} {list(piece.shape)} is cut over {self.world} files is not "
            "known; mconv reads the dense Llama 1 to 3 models"
        )

    def copies(
        self, name: str, pieces: Sequence[LazyTensor], dim: int | None
    ) -> list[Sequence[LazyTensor]]:
        """Return the parts of the tensor, and of each further copy of it, to be compared."""
        if dim is None:
            return [[p] for p in pieces]
        heads = self._number("n_kv_heads")
        rows = sum(p.shape[0] for p in pieces)
        is_kv = any(f".{k}." in name for k in _KV)
        if not is_kv or heads is None or heads >= self.world or rows == self._kv_rows():
            return [pieces]
        times = self.world // heads
        return [pieces[k::times] for k in range(times)]

    def check(self, weights: Mapping[str, LazyTensor]) -> None:
        """Refuse sizes that contradict the model's: the sign of a missing last file."""
        head_dim = self._head_dim()
        heads = self._number("n_heads")
        vocab = self._number("vocab_size")
        rows = None if heads is None or head_dim is None else heads * head_dim
        expected = {"wq": (0, rows), "wk": (0, self._kv_rows()), "wv": (0, self._kv_rows())}
        expected |= {"wo": (1, rows), "output": (0, vocab), "tok_embeddings": (0, vocab)}
        for name, tensor in weights.items():
            dim, size = expected.get(name.removesuffix(".weight").rpartition(".")[2], (0, None))
            if size is not None and tensor.ndim == 2 and tensor.shape[dim] != size:
                raise LayoutError(
                    f"{self.root}: {name!r} is {list(tensor.shape)} after joining {self.world} "
                    f"files, but {PARAMS} demands {size} on dim {dim}: files are missing, or "
                    f"{PARAMS} belongs to another model"
                )
        embedding = weights.get("tok_embeddings.weight")
        if embedding is not None and embedding.shape[1] != self.dim:
            raise LayoutError(
                f"{self.root}: the embedding has {embedding.shape[1]} columns after joining "
                f"{self.world} files, the model is {self.dim} wide: files are missing"
            )

    def _number(self, key: str) -> int | None:
        value = self.params.get(key)
        return value if type(value) is int and value > 0 else None

    def _head_dim(self) -> int | None:
        heads = self._number("n_heads")
        return self._number("head_dim") or (self.dim // heads if heads else None)

    def _kv_rows(self) -> int | None:
        heads = self._number("n_kv_heads") or self._number("n_heads")
        head_dim = self._head_dim()
        return heads * head_dim if heads and head_dim else None


FORMAT = Format("meta", "Meta consolidated.NN.pth", detect, open_meta, rank=45)
