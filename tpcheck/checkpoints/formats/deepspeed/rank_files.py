"""Find the file of each rank in the folder of a DeepSpeed checkpoint, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.checkpoints.formats.files import Files, inside, is_folder, is_present, names_in, shortened
from tpcheck.core.errors import CheckpointError


def mapping(value: Any) -> Mapping[Any, Any]:
    """Return the value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    """Return the value if it is a list or tuple, else an empty one."""
    return value if isinstance(value, (list, tuple)) else ()


_MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<tp>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<tp>\d+)_optim_states\.pt")
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt")
_PIPELINE_LAYER = re.compile(r"layer_\d+-model_.*model_states\.pt")
_MAX_TAG_NBYTES = 4096

Grid = Mapping[int, Mapping[int, Path]]
"""Files by tp_rank, then dp_rank."""


@dataclass(frozen=True, slots=True)
class TrainingFolder:
    """The files of one saved step.

    Attributes:
        path: The folder.
        partitioned: Whether every data-parallel rank has its own model states: ZeRO 3.
        models: Model states; dp_rank 0 only, unless they are partitioned.
        optimizers: ZeRO's optimizer partitions; empty without ZeRO.
        experts: Names of the files of mixture-of-experts layers, which are not read.
    """

    path: Path
    partitioned: bool
    models: Grid
    optimizers: Grid
    experts: tuple[str, ...]

    @property
    def tp(self) -> int:
        return len(self.models)


def looks_like_training(folder: Path) -> bool:
    """Return whether the folder, or one that its `latest` may name, holds model states, by names alone."""
    names = names_in(folder)
    steps = [folder / name for name in names] if "latest" in names else []
    return _is_step(names) or any(_is_step(names_in(step)) for step in steps if is_folder(step))


def _is_step(names: Iterable[str]) -> bool:
    return any(map(_MODEL.fullmatch, names))


def step_folder(root: Path, files: Files, pointer: str = "latest") -> Path:
    """Return the folder of the step that the file `latest` names, or the root where there is no such file.

    Raises:
        CheckpointError: The name leads out of the root, or to no folder.
    """
    if not is_present(root / pointer):
        return root
    file = files.open(root / pointer)
    tag = bytes(file.read(0, min(file.size, _MAX_TAG_NBYTES))).decode("utf-8", "replace").strip()
    step = inside(root, tag)
    if not is_folder(step):
        raise CheckpointError(f"{root / pointer} names {shortened(tag)}, but there is no such folder.")
    if step.is_symlink() and not step.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"{root / pointer} names {shortened(tag)}, which is a link out of the folder.")
    return step


def training_folder(path: Path) -> TrainingFolder:
    """Return the files of a step by rank.

    Raises:
        CheckpointError: The file of a rank is missing, or the checkpoint is one of pipeline parallelism.
    """
    names = names_in(path)
    if any(map(_PIPELINE_LAYER.fullmatch, names)):
        raise CheckpointError(f"{path} was saved with pipeline parallelism, whose stages cannot be read.")
    model_files = [match for name in names if (match := _MODEL.fullmatch(name))]
    if not model_files:
        raise CheckpointError(f"{path} holds no model states (mp_rank_00_model_states.pt).")
    partitioned = {match["dp"] is not None for match in model_files}
    if len(partitioned) > 1:
        raise CheckpointError(f"{path} holds model states of ZeRO 3 and of other stages, so files of different saves.")
    models = _grid(path, model_files)
    optimizers = _grid(path, [match for name in names if (match := _OPTIMIZER.fullmatch(name))])
    if optimizers and len(optimizers) != len(models):
        missing = min(set(models) ^ set(optimizers))
        raise CheckpointError(f"{path} holds only one of model states and optimizer states of mp rank {missing}.")
    experts = tuple(name for name in names if _EXPERT.fullmatch(name))
    return TrainingFolder(path, partitioned.pop(), models, optimizers, experts)


def _grid(path: Path, matches: list[re.Match[str]]) -> Grid:
    grid: dict[int, dict[int, Path]] = {}
    for match in matches:
        row = grid.setdefault(int(match["tp"]), {})
        dp_rank = int(match["dp"] or 0)
        if dp_rank in row:
            raise CheckpointError(
                f"{path} holds both {row[dp_rank].name} and {match.string}, of the same rank; keep only one of the "
                "two files."
            )
        row[dp_rank] = path / match.string
    num_dp = max((dp_rank for row in grid.values() for dp_rank in row), default=-1) + 1
    all_ranks = ((tp_rank, dp_rank) for tp_rank in range(max(grid, default=-1) + 1) for dp_rank in range(num_dp))
    missing = next((ranks for ranks in all_ranks if ranks[1] not in grid.get(ranks[0], {})), None)
    if missing is not None:
        where = f"mp rank {missing[0]}" + (f", dp rank {missing[1]}" if num_dp > 1 else "")
        raise CheckpointError(f"{path} holds no file like {matches[0].string} for {where}.")
    return grid
