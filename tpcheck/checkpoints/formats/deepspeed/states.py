"""What one TP rank holds of the model: float32 masters where ZeRO keeps them, else the module's own tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.deepspeed.folder import TrainingFolder, is_sizes, mapping, sequence
from tpcheck.checkpoints.formats.deepspeed.shards import Segment, Shard
from tpcheck.checkpoints.formats.files import Files, shortened
from tpcheck.checkpoints.formats.stored import StoredTensor
from tpcheck.checkpoints.formats.torch_files import load
from tpcheck.checkpoints.formats.unpickler import Inert
from tpcheck.core.errors import CheckpointError

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


_DEEPSPEED = ("deepspeed.*",)
"""Loss scalers, addresses of fragments and enums lie beside the weights; none of them is made."""


@dataclass(frozen=True, slots=True)
class RankState:
    """One TP rank's part of the model.

    Attributes:
        path: Its model states, the first where there are several.
        shards: By name, in the order of the module.
        rounded: What the module itself holds of those that come from masters, in lower precision.
        stage: The ZeRO stage whose masters they are, or None where the module's tensors are all there is.
        num_dp: Number of data-parallel ranks that the optimizer states are cut over.
        ties: Names by the name of the parameter that they share.
        shared: Those of them that DeepSpeed wrote down, which it does on global rank 0 alone.
        buffers: Names of tensors that are no parameters, and that no layer cuts.
        unread: What is no tensor, with the reason.
        info: `universal_checkpoint_info`: how AutoTP cut the parameters.
        facts: What all ranks must agree on.
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
    facts: Mapping[str, Any]

    @property
    def version(self) -> str:
        version = self.facts.get("ds_version")
        return version if isinstance(version, str) and version.isprintable() and len(version) < 40 else ""


def rank_state(
    folder: TrainingFolder, tp_rank: int, files: Files, options: ReadOptions, shared: Mapping[str, str]
) -> RankState:
    """Read the tables of contents of one TP rank's files.

    Args:
        shared: What tp_rank 0 says is shared.

    Raises:
        CheckpointError: They are damaged, or do not belong together.
    """
    paths = folder.models[tp_rank]
    states = {0: _loaded(paths[0], files, options)}
    state = states[0]
    module, unread = _module(paths[0], state)
    partitions = _partitions(folder, tp_rank, files, options)
    if partitions is None and folder.partitioned:
        raise CheckpointError(f"{folder.path} is of ZeRO 3, whose weights are in optimizer states that are not there.")
    masters = {} if partitions is None else dict(partitions.shards(state.get("param_shapes")))
    if folder.partitioned and mapping(state.get("frozen_param_shapes")):
        states.update({rank: _loaded(path, files, options) for rank, path in paths.items() if rank})
        masters |= _frozen(paths[0], states)
    shared = {**shared, **_names(state.get("shared_params"))}
    ties = {**_shared_storage(module), **shared}
    buffers = frozenset(name for name in sequence(state.get("buffer_names")) if isinstance(name, str))
    # Under ZeRO 3 the module's own parameters are placeholders without elements.
    empty = {name for name, shard in module.items() if folder.partitioned and not shard.numel} - buffers
    shards = {}
    for name in dict.fromkeys((*module, *masters, *ties)):
        held = masters.get(name) or masters.get(ties.get(name, "")) or module.get(name)
        if held is None or (name in empty and held is module[name]):
            unread.setdefault(name, "its place is empty, and no ZeRO partition holds it")
        else:
            shards[name] = held
    rounded = {name: module[name] for name in masters if name in module and name not in empty}
    facts = {key: state.get(key) for key in ("ds_version", "global_steps", "mp_world_size", "dp_world_size")}
    facts |= mapping(state.get("checkpoint_parallel_dimensions"))
    stage = None if partitions is None else partitions.stage
    num_dp = len(folder.optimizers.get(tp_rank, ())) or 1
    info = mapping(state.get("universal_checkpoint_info"))
    return RankState(paths[0], shards, rounded, stage, num_dp, ties, shared, buffers, unread, info, facts)


def _loaded(path: Path, files: Files, options: ReadOptions) -> Mapping[Any, Any]:
    state = load(path, files, options, inert=_DEEPSPEED)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds no state of DeepSpeed, but an object of type {type(state).__name__}.")
    return state


def _module(path: Path, state: Mapping[Any, Any]) -> tuple[dict[str, Shard], dict[str, str]]:
    module = state.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{path} holds no weights: its entry 'module' is missing.")
    shards, unread = {}, {}
    for name, value in module.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} has a weight without a name: {shortened(name)}.")
        if isinstance(value, StoredTensor):
            shards[name] = Shard.of(value)
        elif value is not None:
            unread[name] = "it is no tensor"
    return shards, unread


def _partitions(folder: TrainingFolder, tp_rank: int, files: Files, options: ReadOptions) -> Partitions | None:
    paths = folder.optimizers.get(tp_rank)
    if not paths:
        return None
    return Partitions({rank: _loaded(path, files, options) for rank, path in paths.items()}, paths)


def _frozen(path: Path, states: Mapping[int, Mapping[Any, Any]]) -> dict[str, Shard]:
    """Return the parameters that no optimizer holds; ZeRO 3 cuts them over the data-parallel ranks, too."""
    found = {}
    for name, shape in mapping(states[0].get("frozen_param_shapes")).items():
        if not isinstance(name, str) or not is_sizes(shape):
            raise CheckpointError(f"{path} has frozen_param_shapes that are no names with shapes.")
        held = [mapping(states[rank].get("frozen_param_fragments")).get(name) for rank in sorted(states)]
        parts = [part for part in held if isinstance(part, StoredTensor)]
        if len(parts) != len(states) or len({part.dtype for part in parts}) > 1:
            raise CheckpointError(f"{path} or a neighbour does not hold its part of {name}.")
        segments = tuple(cut([Segment(part, 0, prod(part.shape)) for part in parts], prod(shape)))
        if sum(segment.numel for segment in segments) != prod(shape):
            raise CheckpointError(f"{path} and its neighbours hold too little of {name}.")
        found[name] = Shard(tuple(shape), parts[0].dtype, segments)
    return found


def _shared_storage(module: Mapping[str, Shard]) -> dict[str, str]:
    """Return names whose tensor is the same view of the same storage, by name of the first."""
    first: dict[StoredTensor, str] = {}
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
