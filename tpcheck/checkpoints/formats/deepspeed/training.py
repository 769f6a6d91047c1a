"""DeepSpeed training checkpoints: the states of all TP ranks, merged into the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions, TrainingStates
from tpcheck.checkpoints.formats.deepspeed.autotp_layouts import AutoTPLayouts
from tpcheck.checkpoints.formats.deepspeed.merge_tp_shards import LayoutError, MergedTensor, Shard, same_bits
from tpcheck.checkpoints.formats.deepspeed.rank_files import (
    TrainingFolder,
    looks_like_training,
    mapping,
    step_folder,
    training_folder,
)
from tpcheck.checkpoints.formats.deepspeed.rank_state import RankState, read_rank_state
from tpcheck.checkpoints.formats.file_checkpoint import FileCheckpoint
from tpcheck.checkpoints.formats.files import Files, is_folder, read_config, shortened
from tpcheck.checkpoints.formats.storage_view import StorageView
from tpcheck.checkpoints.formats.training_states import COUNT, StateTable
from tpcheck.core.errors import CheckpointError

_COMPARED = 1024
"""Elements from the start of each parameter that are compared with their masters: a parameter that was not updated
differs everywhere, and comparing all elements would be a second reading of the checkpoint."""


def _note_on_rounding(states: Sequence[RankState], files: Files) -> str:
    """Return a note on parameters of the module that are not their masters, rounded; empty if there are none."""
    names = list(dict.fromkeys(name for state in states for name in _not_rounded(state, files)))
    if not names:
        return ""
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"; the module's {listed} {'is' if len(names) == 1 else 'are'} not rounded from them"


def _not_rounded(state: RankState, files: Files) -> Iterator[str]:
    for name, rounded in state.rounded.items():
        master = state.shards[name]
        count = min(_COMPARED, master.numel)
        if master.shape != rounded.shape:
            yield name
        elif master.dtype.is_floating_point and rounded.dtype.is_floating_point:
            expected = master.read(files, 0, count).to(rounded.dtype)
            if not same_bits(rounded.read(files, 0, count), expected):
                yield name


class TrainingFormat:
    """Opens the folder of a step, or the folder above it, whose `latest` names the step."""

    name = "deepspeed-training"
    precedence = 40  # below safetensors: transformers' Trainer writes its model beside the steps

    def recognises(self, source: Any) -> bool:
        return is_folder(source) and looks_like_training(source)

    def open(self, source: Any, options: ReadOptions) -> FileCheckpoint:
        with Files() as files:
            return open_training(source, files, options)


def open_training(root: Path, files: Files, options: ReadOptions) -> FileCheckpoint:
    """Open the step in a folder, or the one that its `latest` names."""
    return _open(root, training_folder(step_folder(root, files)), files, options)


def _open(root: Path, folder: TrainingFolder, files: Files, options: ReadOptions) -> FileCheckpoint:
    states = [read_rank_state(folder, 0, files, options, shared={})]
    for tp_rank in range(1, folder.tp):
        states.append(read_rank_state(folder, tp_rank, files, options, states[0].shared))
    _require_one_save(states)
    layouts = AutoTPLayouts(states[0].info)
    ties = _ties(states)
    tensors: dict[str, MergedTensor] = {}
    unread = dict.fromkeys(folder.experts, "the files of experts are not read")
    inconsistent: dict[str, str] = {}
    for names in _tied_names(states, ties):
        merged = _merge(names, states, layouts, files)
        if isinstance(merged, MergedTensor):
            tensors |= dict.fromkeys(names, merged)
        else:
            problems = inconsistent if isinstance(merged, _InconsistentReplicas) else unread
            problems |= dict.fromkeys(names, str(merged))
    return FileCheckpoint(
        files,
        _description(states) + _note_on_rounding(states, files),
        tensors,
        read_config(root, files),
        ties=tuple(tied for tied in ties if tied <= tensors.keys()),
        unread=unread,
        inconsistent_replicas=inconsistent,
        read_states=lambda: read_training_states(states, layouts, files),
    )


class _InconsistentReplicas(Exception):
    """The copies of a replicated tensor differ; the message names two ranks."""


def _merge(
    names: Sequence[str], states: Sequence[RankState], layouts: AutoTPLayouts, files: Files
) -> MergedTensor | _InconsistentReplicas | LayoutError:
    """Merge the shards of the tensor that has these tied names, or return why they cannot be merged."""
    try:
        shards = [_shard(names, state) for state in states]
    except LayoutError as error:
        return error
    return merge_shards(
        names, shards, layouts, files, is_parameter=len(states) > 1 and names[0] not in states[0].buffers
    )


def merge_shards(
    names: Sequence[str], shards: Sequence[Shard], layouts: AutoTPLayouts, files: Files, *, is_parameter: bool
) -> MergedTensor | _InconsistentReplicas | LayoutError:
    """Merge the shards of TP ranks by the layout of the parameter with these names, or as replicas."""
    try:
        dtypes = {shard.dtype for shard in shards if shard.numel}
        if len(dtypes) > 1:
            raise LayoutError(f"mp ranks hold it as {' and '.join(sorted(map(str, dtypes)))}")
        merged = (layouts.merge(name, shards) for name in names if is_parameter)
        stated = next((tensor for tensor in merged if tensor is not None), None)
        tensor = stated or _replicated(shards)
    except LayoutError as error:
        return error
    differing = tensor.differing_ranks(files)
    if not differing:
        return tensor
    reason = f"mp ranks {differing[0]} and {differing[1]} hold different copies of it"
    if stated or not is_parameter:
        return _InconsistentReplicas(reason)
    return LayoutError(f"{reason}, and the files do not state how it was cut")


def _shard(names: Sequence[str], state: RankState) -> Shard:
    for name in names:
        if name in state.unread:
            raise LayoutError(state.unread[name])
    shard = state.shards.get(names[0])
    if shard is None:
        raise LayoutError(f"{state.path.name} does not hold it")
    return shard


def _replicated(shards: Sequence[Shard]) -> MergedTensor:
    if len({shard.shape for shard in shards}) > 1:
        raise LayoutError("mp ranks hold different shapes of it, and the files do not state how it was cut")
    return MergedTensor.replicated(shards)


def _require_one_save(states: Sequence[RankState]) -> None:
    first = states[0]
    for state in states[1:]:
        for key, value in first.metadata.items():
            if state.metadata.get(key) != value:
                raise CheckpointError(
                    f"{state.path} has {key} {shortened(state.metadata.get(key))}, but {first.path.name} has "
                    f"{shortened(value)}: they are of different saves."
                )
        if state.info != first.info:
            raise CheckpointError(f"{state.path} and {first.path.name} state different layouts of the parameters.")
    for key in ("mp_world_size", "tp_degree"):
        if first.metadata.get(key) not in (None, len(states)):
            raise CheckpointError(
                f"{first.path.parent} holds model states of {len(states)} mp ranks, but was saved with "
                f"{key} {shortened(first.metadata[key])}."
            )


def _ties(states: Sequence[RankState]) -> tuple[frozenset[str], ...]:
    """Return the groups of names that are one tensor on every rank."""
    groups: dict[str, set[str]] = {}
    for alias, name in states[0].ties.items():
        if all(name in state.shards and state.shards.get(alias) == state.shards[name] for state in states):
            groups.setdefault(name, {name}).add(alias)
    return tuple(map(frozenset, groups.values()))


def _tied_names(states: Sequence[RankState], ties: Sequence[frozenset[str]]) -> Iterator[tuple[str, ...]]:
    """Yield all names of each tensor, in the order of the first rank's module."""
    tied = {name: group for group in ties for name in group}
    done: set[str] = set()
    order = dict.fromkeys(name for state in states for name in (*state.shards, *state.unread))
    for name in order:
        if name not in done:
            names = tuple(other for other in order if other in tied[name]) if name in tied else (name,)
            done.update(names)
            yield names


def _description(states: Sequence[RankState]) -> str:
    first = states[0]
    writer = f"DeepSpeed {first.version}" if first.version else "DeepSpeed"
    sizes = f"tp {len(states)}" + (f", dp {first.num_dp}" if first.num_dp > 1 else "")
    if first.stage is None:
        return f"{writer} training checkpoint, {sizes}: the module's weights"
    return f"{writer} training checkpoint, {sizes}, ZeRO {first.stage}: the optimizer's float32 weights"


def read_training_states(states: Sequence[RankState], layouts: AutoTPLayouts, files: Files) -> TrainingStates | None:
    """Return the optimizer's tensors, merged as the weights are, and what the first rank saved of all ranks."""
    table = StateTable()
    first = states[0]
    moments = [_moments(state) for state in states]
    for kind, by_parameter in moments[0].items():
        for name in by_parameter:
            shards = [of_rank.get(kind, {}).get(name) for of_rank in moments]
            held = [shard for shard in shards if shard is not None]
            if len(held) < len(shards):
                table.unread[f"{name} {kind}"] = "some mp ranks do not hold it"
                continue
            merged = merge_shards((name,), held, layouts, files, is_parameter=len(states) > 1)
            if isinstance(merged, MergedTensor):
                table.tensors[f"{name} {kind}"] = merged
            else:
                table.unread[f"{name} {kind}"] = str(merged)
    if first.partitions is not None:
        groups, steps, scaler = first.partitions.common_states()
        table.add_groups(groups, files)
        counted = StateTable()
        counted.add_entries(steps, files, {})
        table.add_steps(counted.values)
        table.add("scaler", scaler, files)
    else:
        optimizer = mapping(first.model_states.get("optimizer"))
        table.add_optimizer({**optimizer, "state": _steps(optimizer)}, files, {})
    add_common_states(table, first.model_states, files)
    return table.states(files)


def add_common_states(table: StateTable, model_states: Mapping[Any, Any], files: Files) -> None:
    """Add the scheduler and the counts of the model states."""
    for key, name in {"lr_scheduler": "scheduler", "global_steps": COUNT, "skipped_steps": "skipped steps"}.items():
        if model_states.get(key) is not None:
            table.add(name, model_states[key], files)


def _moments(state: RankState) -> Mapping[str, Mapping[str, Shard]]:
    """Return the optimizer's tensors of one TP rank by kind and parameter."""
    if state.partitions is not None:
        return state.partitions.moments(state.model_states.get("param_shapes"))
    by_number = mapping(mapping(state.model_states.get("optimizer")).get("state"))
    names = [name for name in state.shards if name not in state.buffers and name not in state.ties]
    trained = [name for name in names if name not in mapping(state.model_states.get("frozen_param_shapes"))]
    moments: dict[str, dict[str, Shard]] = {}
    for number, name in zip(sorted(by_number), trained, strict=False):
        for kind, value in mapping(by_number[number]).items():
            if isinstance(value, StorageView) and value.shape == state.shards[name].shape and value.shape:
                moments.setdefault(str(kind), {})[name] = Shard.of(value)
    # Numbers are those of the module's parameters in order only if all shapes agree.
    are_all = len(by_number) == len(trained) and all(len(names) == len(trained) for names in moments.values())
    return moments if are_all else {}


def _steps(optimizer: Mapping[Any, Any]) -> Mapping[Any, Any]:
    by_number = mapping(optimizer.get("state"))
    return {number: {"step": mapping(kinds)["step"]} for number, kinds in by_number.items() if "step" in mapping(kinds)}
