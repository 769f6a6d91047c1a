"""The model's tensors on one TP rank: float32 masters where ZeRO keeps them, else the tensors of the module.

The masters are joined from the partitions that ZeRO gives the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.deepspeed.merge_tp_shards import Segment, Shard
from tpcheck.checkpoints.formats.deepspeed.rank_files import TrainingFolder, mapping, sequence
from tpcheck.checkpoints.formats.files import Files, is_sizes, shortened
from tpcheck.checkpoints.formats.storage_view import StorageView
from tpcheck.checkpoints.formats.torch_files import load
from tpcheck.checkpoints.formats.unpickler import PickledObject
from tpcheck.core.errors import CheckpointError

Flat = Sequence[StorageView]
"""Flat tensors of one data-parallel rank, one for each parameter group."""

Shapes = Mapping[str, tuple[int, ...]]


class Partitions:
    """The optimizer states of one TP rank, by dp_rank.

    Attributes:
        stage: The ZeRO stage that saved them.
    """

    def __init__(self, states: Mapping[int, Any], paths: Mapping[int, Path]) -> None:
        self._path = paths[0]
        self._states = [mapping(mapping(states[rank]).get("optimizer_state_dict")) for rank in sorted(states)]
        stages = {_stage(state.get("zero_stage")) for state in self._states}
        self.stage = stages.pop() if len(stages) == 1 else None
        if self.stage not in (1, 2, 3):
            raise CheckpointError(f"{self._path} and the files of other ranks do not state their ZeRO stage.")
        self._require_all_ranks()

    def shards(self, shapes_by_group: Any) -> dict[str, Shard]:
        """Return the float32 weights of each parameter.

        Args:
            shapes_by_group: `param_shapes` of the model states.
        """
        groups = self._groups(shapes_by_group)
        if self.stage == 3:
            return self._by_parameter(groups, [self._flat(state, "fp32_flat_groups") for state in self._states])
        key = "single_partition_of_fp32_groups"
        return self._by_group(groups, [self._flat(state, key, len(groups)) for state in self._states])

    def moments(self, shapes_by_group: Any) -> dict[str, dict[str, Shard]]:
        """Return the optimizer's tensors of each parameter, by their kind, such as `exp_avg`.

        They are flattened and cut as the weights are. Kinds whose tensors are not as long as the weights are left out.
        """
        groups = self._groups(shapes_by_group)
        weights = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        states = [mapping(self._optimizer(state).get("state")) for state in self._states]
        lengths = [[prod(flat.shape) for flat in self._flat(state, weights)] for state in self._states]
        moments: dict[str, dict[str, Shard]] = {}
        for kind in dict.fromkeys(kind for group in states[0].values() for kind in mapping(group)):
            flats = [[mapping(group).get(kind) for _, group in sorted(state.items())] for state in states]
            if all(map(_are_flat, flats, lengths)):
                combined: Callable[..., dict[str, Shard]] = self._by_parameter if self.stage == 3 else self._by_group
                moments[str(kind)] = combined(groups, flats)
        return moments

    def common_states(self) -> tuple[Any, dict[str, Any], Any]:
        """Return what every rank has: the options of the parameter groups, their step counts, the loss scaler."""
        state = self._states[0]
        optimizer = self._optimizer(state)
        steps = {
            f"optimizer group {number}": group["step"]
            for number, group in mapping(optimizer.get("state")).items()
            if "step" in mapping(group)
        }
        return optimizer.get("param_groups"), steps, state.get("loss_scaler")

    def _optimizer(self, state: Mapping[Any, Any]) -> Mapping[Any, Any]:
        return mapping(state.get("optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"))

    def _groups(self, shapes_by_group: Any) -> list[Shapes]:
        groups: list[Shapes] = [dict(_shapes(self._path, group)) for group in sequence(shapes_by_group)]
        if not groups:
            raise CheckpointError(f"{self._path} has no parameters: the model states have no param_shapes.")
        return groups

    def _by_group(self, groups: Sequence[Shapes], flats: Sequence[Flat]) -> dict[str, Shard]:
        """ZeRO 1 and 2 flatten each parameter group and cut it over the ranks."""
        paddings = self._states[0].get("param_alignment_paddings")
        shards: dict[str, Shard] = {}
        for index, shapes in enumerate(groups):
            partitions = [flat[index] for flat in flats]
            position = 0
            padding_of_group = _paddings(self._path, paddings, index, len(shapes))
            for (name, shape), padding in zip(shapes.items(), padding_of_group, strict=True):
                segments = tuple(_segments(partitions, position, prod(shape)))
                shards[name] = Shard(shape, partitions[0].dtype, segments)
                position += prod(shape) + padding
            self._require_all_used(position, sum(prod(partition.shape) for partition in partitions))
        return shards

    def _by_parameter(self, groups: Sequence[Shapes], flats: Sequence[Flat]) -> dict[str, Shard]:
        """ZeRO 3 cuts each parameter over the ranks and flattens the parts of each rank."""
        shards: dict[str, Shard] = {}
        position = 0
        for name, shape in (item for shapes in groups for item in shapes.items()):
            numel_per_rank = -(-prod(shape) // len(flats))
            segments = [segment for flat in flats for segment in _segments(flat, position, numel_per_rank)]
            shards[name] = Shard(shape, flats[0][0].dtype, tuple(_without_padding(segments, prod(shape))))
            position += numel_per_rank
        for flat in flats:
            available = sum(prod(tensor.shape) for tensor in flat)
            if available != position:
                raise CheckpointError(
                    f"{self._path} or the file of another rank holds {available} elements, but its parameters have "
                    f"{position}."
                )
        return shards

    def _flat(self, state: Mapping[Any, Any], key: str, num_groups: int | None = None) -> Flat:
        flat = sequence(state.get(key))
        if not flat or not all(isinstance(tensor, StorageView) and len(tensor.shape) == 1 for tensor in flat):
            raise CheckpointError(f"{self._path} or the file of another rank has no flat tensors in {key}.")
        if num_groups is not None and len(flat) != num_groups:
            raise CheckpointError(
                f"{self._path} or the file of another rank has {len(flat)} groups, but there are shapes of "
                f"{num_groups}."
            )
        if len({tensor.dtype for tensor in flat}) > 1:
            raise CheckpointError(f"{self._path} or the file of another rank has {key} of several dtypes.")
        return flat

    def _require_all_ranks(self) -> None:
        for state in self._states:
            count = state.get("partition_count")
            for number in count if isinstance(count, (list, tuple)) else (count,):
                if number != len(self._states):
                    raise CheckpointError(
                        f"{self._path.parent} holds optimizer states of {len(self._states)} data-parallel ranks, "
                        f"but {self._path.name} or the file of another rank was saved with {shortened(number)}."
                    )

    def _require_all_used(self, used: int, available: int) -> None:
        # Groups are padded to a multiple of twice the number of ranks (zero_to_fp32, `zero2_align`).
        alignment = 2 * len(self._states)
        if -(-used // alignment) != -(-available // alignment):
            raise CheckpointError(
                f"{self._path} and the files of other ranks hold {available} elements, but their parameters have "
                f"{used}."
            )


def _are_flat(tensors: Sequence[Any], lengths: Sequence[int]) -> bool:
    are_flat = all(isinstance(tensor, StorageView) and len(tensor.shape) == 1 for tensor in tensors)
    return are_flat and [prod(tensor.shape) for tensor in tensors] == list(lengths)


def frozen_shards(path: Path, states: Mapping[int, Mapping[Any, Any]]) -> dict[str, Shard]:
    """Return the frozen parameters, which no optimizer holds and ZeRO 3 cuts over the data-parallel ranks.

    Args:
        path: The model states of dp_rank 0, for error messages.
        states: The model states by dp_rank.
    """
    shards = {}
    for name, shape in mapping(states[0].get("frozen_param_shapes")).items():
        if not isinstance(name, str) or not is_sizes(shape):
            raise CheckpointError(f"{path} has frozen_param_shapes that are not names with shapes.")
        fragments = [mapping(states[rank].get("frozen_param_fragments")).get(name) for rank in sorted(states)]
        parts = [fragment for fragment in fragments if isinstance(fragment, StorageView)]
        if len(parts) != len(states) or len({part.dtype for part in parts}) > 1:
            raise CheckpointError(f"{path} or the file of another rank does not hold its part of {name}.")
        segments = _without_padding([Segment(part, 0, prod(part.shape)) for part in parts], prod(shape))
        shard = Shard(tuple(shape), parts[0].dtype, tuple(segments))
        if sum(segment.numel for segment in shard.segments) != shard.numel:
            raise CheckpointError(f"{path} and the files of other ranks do not hold all of {name}.")
        shards[name] = shard
    return shards


def _without_padding(segments: Sequence[Segment], numel: int) -> Iterator[Segment]:
    """Yield the first `numel` elements."""
    for segment in segments:
        if numel > 0:
            yield Segment(segment.tensor, segment.start, min(segment.numel, numel))
        numel -= segment.numel


def _segments(tensors: Sequence[StorageView], start: int, numel: int) -> Iterator[Segment]:
    """Yield consecutive elements of flat tensors that follow each other."""
    position = 0
    for tensor in tensors:
        size = prod(tensor.shape)
        first, last = max(start - position, 0), min(start + numel - position, size)
        if first < last:
            yield Segment(tensor, first, last - first)
        position += size


def _paddings(path: Path, paddings: Any, group: int, num_parameters: int) -> Sequence[int]:
    if paddings is None:
        return [0] * num_parameters
    of_group = sequence(sequence(paddings)[group]) if group < len(sequence(paddings)) else ()
    if len(of_group) != num_parameters or not is_sizes(of_group):
        raise CheckpointError(f"{path} does not state the padding of the {num_parameters} parameters of group {group}.")
    return of_group


def _shapes(path: Path, group: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in mapping(group).items():
        if not isinstance(name, str) or not is_sizes(shape):
            raise CheckpointError(f"The param_shapes beside {path} are not names with shapes.")
        yield name, tuple(shape)


def _stage(value: Any) -> Any:
    if isinstance(value, PickledObject) and len(value.arguments) == 1:  # ZeroStageEnum
        return value.arguments[0]
    return value


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
        model_states: The model states of dp_rank 0, as they are in the file.
        partitions: The optimizer's partitions; None without ZeRO.
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
    model_states: Mapping[Any, Any]
    partitions: Partitions | None

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
    optimizer_paths = folder.optimizers.get(tp_rank, {})
    optimizers = {rank: load_states(path, files, options) for rank, path in optimizer_paths.items()}
    partitions = Partitions(optimizers, optimizer_paths) if optimizers else None
    if partitions is None and folder.partitioned:
        raise CheckpointError(
            f"{folder.path} is of ZeRO 3, but the optimizer states that hold its weights are missing."
        )
    masters = {} if partitions is None else partitions.shards(state.get("param_shapes"))
    if folder.partitioned and mapping(state.get("frozen_param_shapes")):
        states = {rank: state if rank == 0 else load_states(path, files, options) for rank, path in paths.items()}
        masters |= frozen_shards(paths[0], states)
    pairs = mapping(state.get("shared_params")).items()
    shared = {**shared, **{new: old for new, old in pairs if isinstance(new, str) and isinstance(old, str)}}
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
        num_dp=len(optimizers) or 1,
        ties=ties,
        shared=shared,
        buffers=buffers,
        unread=unread,
        info=mapping(state.get("universal_checkpoint_info")),
        metadata={**metadata, **mapping(state.get("checkpoint_parallel_dimensions"))},
        model_states=state,
        partitions=partitions,
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
