"""Join the partitions that ZeRO gives the data-parallel ranks into the shards of one TP rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from tpcheck.checkpoints.formats.deepspeed.merge_tp_shards import Segment, Shard
from tpcheck.checkpoints.formats.deepspeed.rank_files import is_sizes, mapping, sequence
from tpcheck.checkpoints.formats.files import shortened
from tpcheck.checkpoints.formats.storage_view import StorageView
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
        groups = [dict(_shapes(self._path, group)) for group in sequence(shapes_by_group)]
        if not groups:
            raise CheckpointError(f"{self._path} has no parameters: the model states have no param_shapes.")
        return self._by_parameter(groups) if self.stage == 3 else self._by_group(groups)

    def _by_group(self, groups: Sequence[Shapes]) -> dict[str, Shard]:
        """ZeRO 1 and 2 flatten each parameter group and cut it over the ranks."""
        flats = [self._flat(state, "single_partition_of_fp32_groups", len(groups)) for state in self._states]
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

    def _by_parameter(self, groups: Sequence[Shapes]) -> dict[str, Shard]:
        """ZeRO 3 cuts each parameter over the ranks and flattens the parts of each rank."""
        flats = [self._flat(state, "fp32_flat_groups") for state in self._states]
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
