"""Rank folders of Megatron's legacy ``torch`` format: which there are, which there should be.

``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`` (``get_checkpoint_name`` in
``megatron/training/checkpointing.py``). The second field is the pipeline stage, or with one stage
the expert rank: only the saved args tell. Not every combination exists: one file per model-parallel
rank that was the first of its data-parallel group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...errors import FormatError
from ..records import StoredTensor
from ..torchfile import open_torch_file
from .settings import Sizes, coordinates, number, parallel_sizes, plain_args

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt", "model_weights.ckpt")
_RANK = re.compile(r"^(?:mp|tp)_rank_(\d{2,})(?:_(?:pp_rank_)?(\d{3,}))?(?:_(\d{3,}))?$")
_SAME = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "num_layers", "hidden_size", "num_attention_heads",
    "padded_vocab_size", "world_size",
)  # fmt: skip
_THREADS = 8
_PATIENCE = 4096  # missing folders are listed up to so many times the present ones


@dataclass(frozen=True, slots=True)
class RankFile:
    """One opened rank file.

    Attributes:
        path: the file.
        tp, pp, ep: tensor, pipeline and expert rank.
        root: the saved dict, without tensor bytes.
        args: its settings as plain data.
    """

    path: Path
    tp: int
    pp: int
    ep: int
    root: Mapping[str, object]
    args: Mapping[str, object]

    @property
    def chunks(self) -> list[Mapping[object, object]]:
        """The model's state dicts: one, or one per virtual pipeline chunk."""
        models = [self.root["model"]] if "model" in self.root else []
        while f"model{len(models)}" in self.root:
            models.append(self.root[f"model{len(models)}"])
        if not models:  # NeMo 1 saves the bare state dict, or Lightning's wrapper
            bare = any(isinstance(v, StoredTensor) for v in self.root.values())
            models = [self.root] if bare else [self.root.get("state_dict")]
        found: list[Mapping[object, object]] = [m for m in models if isinstance(m, dict)]
        if not found or len(found) != len(models):
            raise FormatError(
                f"{self.path}: has no model in it (keys: {', '.join(map(str, self.root))[:200]}); "
                "expected 'model', or 'model0', 'model1'..."
            )
        return found


def rank_folders(folder: Path) -> dict[tuple[int, ...], Path]:
    """Return {numbers in the name: model file} of the rank folders that hold one."""
    found: dict[tuple[int, ...], Path] = {}
    for child in folder.iterdir():
        m = _RANK.match(child.name)
        if m:
            for name in MODEL_FILES:
                if (child / name).is_file():
                    found[tuple(int(g) for g in m.groups() if g is not None)] = child / name
                    break
    return found


def is_rank_folder(path: Path) -> bool:
    """Whether the name is that of a rank folder."""
    return _RANK.match(path.name) is not None


def open_ranks(folder: Path) -> tuple[list[RankFile], Sizes]:
    """Open all rank files of a checkpoint folder (metadata only) and check that they are one save.

    Returns:
        The files sorted by (pp, ep, tp), and the sizes they agree on.

    Raises:
        FormatError: no rank files, files missing, left over from other runs, swapped, or mixed.
    """
    places = rank_folders(folder)
    if not places:
        direct = [folder / n for n in MODEL_FILES if (folder / n).is_file()]
        if not direct:
            raise FormatError(f"{folder}: has no mp_rank_* folder with {MODEL_FILES[0]} in it")
        places = {(0,): direct[0]}
    with ThreadPoolExecutor(_THREADS) as pool:
        roots = list(pool.map(_open, places.values()))
    args = [plain_args(root.get("args")) for root in roots]
    _check_same(list(places.values()), roots, args)
    sizes = _sizes(args[0], list(places))
    files = [
        RankFile(path, *_position(numbers, sizes), root, a)
        for (numbers, path), root, a in zip(places.items(), roots, args, strict=True)
    ]
    files.sort(key=lambda f: (f.pp, f.ep, f.tp))
    _check_extra(files, sizes)
    _check_missing(folder, files, sizes)
    _check_swapped(files, sizes)
    return files, sizes


def _open(path: Path) -> dict[str, object]:
    root = open_torch_file(path).root
    if type(root) is not dict:
        raise FormatError(f"{path}: holds {type(root).__name__}, expected the dict Megatron saves")
    return {str(k): v for k, v in root.items()}


def _sizes(args: Mapping[str, object], names: Sequence[tuple[int, ...]]) -> Sizes:
    if args:
        return parallel_sizes(args)
    most = [max(n[k] for n in names if len(n) > k) + 1 for k in range(max(map(len, names)))]
    tp, pp, ep = (*most, 1, 1)[:3]
    return Sizes(tp=tp, pp=pp, ep=ep, etp=tp)


def _position(numbers: tuple[int, ...], sizes: Sizes) -> tuple[int, int, int]:
    """(tp, pp, ep) of a rank folder; with two numbers the args say what the second one is."""
    if len(numbers) == 3:
        return numbers[0], numbers[1], numbers[2]
    second = numbers[1] if len(numbers) == 2 else 0
    if sizes.pp == 1 and sizes.ep > 1:
        return numbers[0], 0, second
    return numbers[0], second, 0


def _check_same(
    paths: Sequence[Path],
    roots: Sequence[Mapping[str, object]],
    args: Sequence[Mapping[str, object]],
) -> None:
    for path, root, a in zip(paths[1:], roots[1:], args[1:], strict=True):
        for key in ("iteration", "checkpoint_version"):
            if root.get(key) != roots[0].get(key):
                raise FormatError(
                    f"{path}: {key} is {root.get(key)}, but {paths[0]} has {roots[0].get(key)}: "
                    "the folder mixes two saves"
                )
        for key in _SAME:
            if a.get(key) != args[0].get(key):
                raise FormatError(
                    f"{path}: args.{key} is {a.get(key)}, but {paths[0]} has {args[0].get(key)}: "
                    "the folder mixes two runs"
                )


def _check_extra(files: Sequence[RankFile], sizes: Sizes) -> None:
    for f in files:
        if f.tp >= sizes.tp or f.pp >= sizes.pp or f.ep >= sizes.ep:
            raise FormatError(
                f"{f.path.parent}: does not belong to this checkpoint, which was saved with "
                f"TP={sizes.tp} PP={sizes.pp} EP={sizes.ep}; a leftover of another run? Move it "
                "away"
            )


def _check_missing(folder: Path, files: Sequence[RankFile], sizes: Sizes) -> None:
    need = max(sizes.tp * sizes.pp, sizes.pp * sizes.ep)
    if need > _PATIENCE * len(files):
        raise FormatError(
            f"{folder}: has {len(files)} rank folders, its args (TP={sizes.tp} PP={sizes.pp} "
            f"EP={sizes.ep}) call for at least {need}"
        )
    have = {(f.tp, f.pp) for f in files}
    missing = [
        rank_name(t, p, None, sizes)
        for p in range(sizes.pp)
        for t in range(sizes.tp)
        if (t, p) not in have
    ]
    lost = {t for t in range(sizes.tp) if not any((t, p) in have for p in range(sizes.pp))}
    written = sizes.ep * sizes.etp
    if missing and written < sizes.tp and lost == set(range(written, sizes.tp)):
        raise FormatError(
            f"{folder}: {', '.join(missing)} were never written: Megatron up to core 0.16 saves "
            f"only the first {written} tensor parallel ranks when TP ({sizes.tp}) is larger than "
            f"EP x ETP ({sizes.ep} x {sizes.etp}) (NVIDIA/Megatron-LM#4234). The attention weights "
            "of the others are lost; save again with --ckpt-format torch_dist"
        )
    if not missing and sizes.ep > 1:
        experts = {(f.tp % sizes.etp, f.pp, f.ep) for f in files}
        missing = [
            rank_name(t, p, e, sizes)
            for p in range(sizes.pp)
            for e in range(sizes.ep)
            for t in range(sizes.etp)
            if (t, p, e) not in experts
        ]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise FormatError(
            f"{folder}: rank folders are missing: {', '.join(missing[:8])}{more}. The checkpoint "
            f"was saved with TP={sizes.tp} PP={sizes.pp} EP={sizes.ep} ETP={sizes.etp}; copy them "
            "from the nodes that wrote them"
        )


def rank_name(t: int, p: int, e: int | None, sizes: Sizes) -> str:
    """Name of a rank folder; ``*`` where any expert rank would do."""
    parts = [f"mp_rank_{t:02d}"]
    if sizes.pp > 1:
        parts.append(f"{p:03d}")
    if sizes.ep > 1:
        parts.append("*" if e is None else f"{e:03d}")
    return "_".join(parts)


def _check_swapped(files: Sequence[RankFile], sizes: Sizes) -> None:
    """Compare each folder with the rank of the process that wrote its file."""
    if len({number(f.args, "rank") for f in files}) < len(files):
        return  # conversion tools write all ranks from one process
    for f in files:
        wrote = coordinates(f.args, sizes)
        if wrote is not None and wrote != (f.tp, f.pp, f.ep):
            t, p, e = wrote
            raise FormatError(
                f"{f.path}: was written by global rank {f.args['rank']}, which is tensor rank {t}, "
                f"stage {p}, expert rank {e}, but lies in the folder of tensor rank {f.tp}, stage "
                f"{f.pp}, expert rank {f.ep}: rank files were swapped; it belongs into "
                f"{rank_name(t, p, e, sizes)}"
            )
