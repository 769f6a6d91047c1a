"""Where ZeRO keeps each parameter of one TP rank: flat float32 partitions, one file for each data-parallel rank.

The arithmetic is that of deepspeed/utils/zero_to_fp32.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from tpcheck.checkpoints.deepspeed_training.fields import is_sizes, mapping, sequence
from tpcheck.checkpoints.deepspeed_training.shards import Segment, Shard
from tpcheck.checkpoints.files import shortened
from tpcheck.checkpoints.inert import Inert
from tpcheck.checkpoints.stored import StoredTensor
from tpcheck.errors import CheckpointError

Flat = Sequence[StoredTensor]


class Partitions:
    """The optimizer states of one TP rank, by dp_rank.

    Attributes:
        stage: The ZeRO stage that wrote them.
    """

    def __init__(self, states: Mapping[int, Any], paths: Mapping[int, Path]) -> None:
        self._path = paths[0]
        self._states = [mapping(mapping(states[rank]).get("optimizer_state_dict")) for rank in sorted(states)]
        stages = {_stage(state.get("zero_stage")) for state in self._states}
        self.stage = stages.pop() if len(stages) == 1 else None
        if self.stage not in (1, 2, 3):
            raise CheckpointError(f"{self._path} and its neighbours do not say which ZeRO stage they are of.")
        self._require_all_ranks()

    def shards(self, shapes_by_group: Any) -> dict[str, Shard]:
        """Return each parameter's float32 weights.

        Args:
            shapes_by_group: The model states' `param_shapes`.
        """
        groups = [dict(_shapes(self._path, group)) for group in sequence(shapes_by_group)]
        if not groups:
            raise CheckpointError(f"{self._path} has no parameters: the model states have no param_shapes.")
        return self._in_groups(groups) if self.stage != 3 else self._by_parameter(groups)

    def _in_groups(self, groups: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, Shard]:
        """ZeRO 1 and 2 flatten a whole group and cut it over the ranks."""
        flats = [self._flat(state, "single_partition_of_fp32_groups", len(groups)) for state in self._states]
        paddings = self._states[0].get("param_alignment_paddings")
        found: dict[str, Shard] = {}
        for index, shapes in enumerate(groups):
            partitions = [flat[index] for flat in flats]
            space = _alignments(self._path, paddings, index, len(shapes))
            at = 0
            for (name, shape), padding in zip(shapes.items(), space, strict=True):
                found[name] = Shard(shape, partitions[0].dtype, tuple(_segments(partitions, at, prod(shape))))
                at += prod(shape) + padding
            self._require_used_up(at, sum(prod(one.shape) for one in partitions))
        return found

    def _by_parameter(self, groups: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, Shard]:
        """ZeRO 3 cuts each parameter over the ranks, and flattens each rank's parts."""
        flats = [self._flat(state, "fp32_flat_groups") for state in self._states]
        found: dict[str, Shard] = {}
        at = 0
        for name, shape in (item for shapes in groups for item in shapes.items()):
            part = -(-prod(shape) // len(flats))
            segments = [segment for flat in flats for segment in _segments(flat, at, part)]
            found[name] = Shard(shape, flats[0][0].dtype, tuple(cut(segments, prod(shape))))
            at += part
        for flat in flats:
            available = sum(prod(one.shape) for one in flat)
            if available != at:
                raise CheckpointError(
                    f"{self._path} or a neighbour holds {available} elements, and its parameters have {at}."
                )
        return found

    def _flat(self, state: Mapping[Any, Any], key: str, num_groups: int | None = None) -> Flat:
        flat = sequence(state.get(key))
        if not flat or not all(isinstance(one, StoredTensor) and len(one.shape) == 1 for one in flat):
            raise CheckpointError(f"{self._path} or a neighbour has no flat tensors in {key}.")
        if num_groups is not None and len(flat) != num_groups:
            raise CheckpointError(f"{self._path} or a neighbour has {len(flat)} groups, and {num_groups} have shapes.")
        if len({one.dtype for one in flat}) > 1:
            raise CheckpointError(f"{self._path} or a neighbour has {key} of several dtypes.")
        return flat

    def _require_all_ranks(self) -> None:
        for state in self._states:
            count = state.get("partition_count")
            for one in count if isinstance(count, (list, tuple)) else (count,):
                if one != len(self._states):
                    raise CheckpointError(
                        f"{self._path.parent} holds optimizer states of {len(self._states)} data-parallel ranks, "
                        f"and {self._path.name} or a neighbour was saved with {shortened(one)}."
                    )

    def _require_used_up(self, used: int, available: int) -> None:
        # Groups are padded to a multiple of twice the number of ranks (zero_to_fp32, `zero2_align`).
        alignment = 2 * len(self._states)
        if -(-used // alignment) != -(-available // alignment):
            raise CheckpointError(
                f"{self._path} and its neighbours hold {available} elements, and their parameters have {used}."
            )


def cut(segments: Sequence[Segment], numel: int) -> Iterator[Segment]:
    """Yield the first `numel` elements: what follows is padding."""
    for segment in segments:
        if numel > 0:
            yield Segment(segment.tensor, segment.start, min(segment.numel, numel))
        numel -= segment.numel


def _segments(partitions: Sequence[StoredTensor], start: int, numel: int) -> Iterator[Segment]:
    at = 0
    for partition in partitions:
        size = prod(partition.shape)
        first, last = max(start - at, 0), min(start + numel - at, size)
        if first < last:
            yield Segment(partition, first, last - first)
        at += size


def _alignments(path: Path, paddings: Any, group: int, count: int) -> Sequence[int]:
    if paddings is None:
        return [0] * count
    of_group = sequence(sequence(paddings)[group]) if group < len(sequence(paddings)) else ()
    if len(of_group) != count or not is_sizes(of_group):
        raise CheckpointError(f"{path} does not say how the {count} parameters of group {group} are padded.")
    return of_group


def _shapes(path: Path, group: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in mapping(group).items():
        if not isinstance(name, str) or not is_sizes(shape):
            raise CheckpointError(f"the param_shapes beside {path} are no names with shapes.")
        yield name, tuple(shape)


def _stage(value: Any) -> Any:
    if isinstance(value, Inert) and len(value.arguments) == 1:  # ZeroStageEnum
        return value.arguments[0]
    return value
