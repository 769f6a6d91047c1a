"""The model's tensors on one TP rank: float32 masters where ZeRO keeps them, else the tensors of the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.deepspeed.join_zero_partitions import Partitions, frozen_shards
from tpcheck.checkpoints.formats.deepspeed.merge_tp_shards import Shard
from tpcheck.checkpoints.formats.deepspeed.rank_files import TrainingFolder, mapping, sequence
from tpcheck.checkpoints.formats.files import Files, shortened
from tpcheck.checkpoints.formats.storage_view import StorageView
from tpcheck.checkpoints.formats.torch_files import load
from tpcheck.core.errors import CheckpointError

CLASSES = ("deepspeed.*",)
"""Loss scalers, addresses of fragments and enums are saved beside the weights; none of them is created."""


@dataclass(frozen=True, slots=True)
class RankState:
    """One TP rank's part of the model.

    Attributes:
        path: Its model states; those of dp_rank 0 where there are several.
        shards: The shards by name, in the order of the module.
        rounded: The module's tensors, of lower precision, for those shards that are masters.
        stage: The ZeRO stage that saved the masters, or None without ZeRO.
        num_dp: Number of data-parallel ranks that the optimizer states are cut over.
        ties: The name of a parameter for each further name of it.
        shared: Those ties that DeepSpeed saves, which it does on global rank 0 alone.
        buffers: Names of buffers, which no layer cuts.
        unread: The reason for each entry that cannot be read as a tensor.
        info: `universal_checkpoint_info`: how AutoTP cut the parameters.
        metadata: Values that all ranks must have in common.
    """

    path: Path
    shards: Mapping[str, Shard]
    rounded: Mapping[str, Shard]
    stage: int | None
    num_dp: int
    ties: Mapping[str, str]
    shared: Mapping[str, str]
    buffers: frozenset[str]
    unread: Mapping[str, str]
    info: Mapping[Any, Any]
    metadata: Mapping[str, Any]

    @property
    def version(self) -> str:
        version = self.metadata.get("ds_version")
        return version if isinstance(version, str) and version.isprintable() and len(version) < 40 else ""


def read_rank_state(
    folder: TrainingFolder, tp_rank: int, files: Files, options: ReadOptions, shared: Mapping[str, str]
) -> RankState:
    """Read the tables of contents of one TP rank's files.

    Args:
        shared: The ties that the files of tp_rank 0 state.

    Raises:
        CheckpointError: The files are damaged, or do not belong together.
    """
    paths = folder.models[tp_rank]
    state = load_states(paths[0], files, options)
    module, unread = _module(paths[0], state)
    partitions = _partitions(folder, tp_rank, files, options)
    if partitions is None and folder.partitioned:
        raise CheckpointError(
            f"{folder.path} is of ZeRO 3, but the optimizer states that hold its weights are missing."
        )
    masters = {} if partitions is None else partitions.shards(state.get("param_shapes"))
    if folder.partitioned and mapping(state.get("frozen_param_shapes")):
        states = {rank: state if rank == 0 else load_states(path, files, options) for rank, path in paths.items()}
        masters |= frozen_shards(paths[0], states)
    shared = {**shared, **_names(state.get("shared_params"))}
    ties = {**_tied_by_storage(module), **shared}
    buffers = frozenset(name for name in sequence(state.get("buffer_names")) if isinstance(name, str))
    # Under ZeRO 3 the parameters of the module are placeholders without elements.
    placeholders = {name for name, shard in module.items() if folder.partitioned and not shard.numel} - buffers
    shards = {}
    for name in dict.fromkeys((*module, *masters, *ties)):
        shard = masters.get(name) or masters.get(ties.get(name, "")) or module.get(name)
        if shard is None or (name in placeholders and shard is module[name]):
            unread.setdefault(name, "no ZeRO partition holds its elements")
        else:
            shards[name] = shard
    metadata = {key: state.get(key) for key in ("ds_version", "global_steps", "mp_world_size", "dp_world_size")}
    return RankState(
        path=paths[0],
        shards=shards,
        rounded={name: module[name] for name in masters if name in module and name not in placeholders},
        stage=None if partitions is None else partitions.stage,
        num_dp=len(folder.optimizers.get(tp_rank, ())) or 1,
        ties=ties,
        shared=shared,
        buffers=buffers,
        unread=unread,
        info=mapping(state.get("universal_checkpoint_info")),
        metadata={**metadata, **mapping(state.get("checkpoint_parallel_dimensions"))},
    )


def load_states(path: Path, files: Files, options: ReadOptions) -> Mapping[Any, Any]:
    """Return the states in a file of DeepSpeed."""
    state = load(path, files, options, keep=CLASSES)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} does not hold a state of DeepSpeed, but an object of type {type(state).__name__}."
        )
    return state


def _module(path: Path, state: Mapping[Any, Any]) -> tuple[dict[str, Shard], dict[str, str]]:
    module = state.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{path} holds no weights: its entry 'module' is missing.")
    shards, unread = {}, {}
    for name, value in module.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} has a weight without a name: {shortened(name)}.")
        if isinstance(value, StorageView):
            shards[name] = Shard.of(value)
        elif value is not None:
            unread[name] = "it is not a tensor"
    return shards, unread


def _partitions(folder: TrainingFolder, tp_rank: int, files: Files, options: ReadOptions) -> Partitions | None:
    paths = folder.optimizers.get(tp_rank)
    if not paths:
        return None
    return Partitions({rank: load_states(path, files, options) for rank, path in paths.items()}, paths)


def _tied_by_storage(module: Mapping[str, Shard]) -> dict[str, str]:
    """Return the first name for each further name of the same view of the same storage."""
    first: dict[StorageView, str] = {}
    ties = {}
    for name, shard in module.items():
        if shard.numel:
            tensor = shard.segments[0].tensor
            if tensor in first:
                ties[name] = first[tensor]
            first.setdefault(tensor, name)
    return ties


def _names(value: Any) -> dict[str, str]:
    return {new: old for new, old in mapping(value).items() if isinstance(new, str) and isinstance(old, str)}
