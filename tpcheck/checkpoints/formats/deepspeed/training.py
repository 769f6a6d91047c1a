"""The model of a DeepSpeed training checkpoint: the states of all TP ranks, put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.deepspeed.boxes import LayoutError
from tpcheck.checkpoints.formats.deepspeed.folder import (
    TrainingFolder,
    looks_like_training,
    step_folder,
    training_folder,
)
from tpcheck.checkpoints.formats.deepspeed.layouts import Layouts
from tpcheck.checkpoints.formats.deepspeed.shards import Merged, Shard, same_bits
from tpcheck.checkpoints.formats.deepspeed.states import RankState, rank_state
from tpcheck.checkpoints.formats.files import Files, as_path, is_folder, shortened
from tpcheck.checkpoints.formats.json_files import read_config
from tpcheck.checkpoints.formats.table import TableCheckpoint
from tpcheck.core.errors import CheckpointError

_ELEMENTS = 1024
"""Of each parameter, from its start: what went stale did so everywhere, and all of it would be a second checkpoint."""


def rounding_note(states: Sequence[RankState], files: Files) -> str:
    """Return a remark on parameters whose first elements are not the rounding of their masters, or nothing."""
    stale = list(dict.fromkeys(name for state in states for name in _stale(state, files)))
    if not stale:
        return ""
    names = ", ".join(stale[:3]) + (f" and {len(stale) - 3} more" if len(stale) > 3 else "")
    return f"; the module holds no rounding of them for {names}"


def _stale(state: RankState, files: Files) -> Iterator[str]:
    for name, rounded in state.rounded.items():
        master = state.shards[name]
        count = min(_ELEMENTS, master.numel)
        if master.shape != rounded.shape:
            yield name
        elif master.dtype.is_floating_point and rounded.dtype.is_floating_point:
            expected = master.read(files, 0, count).to(rounded.dtype)
            if not same_bits(rounded.read(files, 0, count), expected):
                yield name


class TrainingFormat:
    """Opens the folder of a step, and the folder above it, whose `latest` names the step."""

    name = "deepspeed-training"
    precedence = 40  # below safetensors: transformers' Trainer writes its model beside the steps

    def recognises(self, source: Any) -> bool:
        path = as_path(source)
        return path is not None and is_folder(path) and looks_like_training(path)

    def open(self, source: Any, options: ReadOptions) -> TableCheckpoint:
        files = Files()
        try:
            step = step_folder(Path(source), files)
            return _opened(Path(source), training_folder(step), files, options)
        except BaseException:
            files.close()
            raise


def _opened(root: Path, folder: TrainingFolder, files: Files, options: ReadOptions) -> TableCheckpoint:
    states = [rank_state(folder, 0, files, options, shared={})]
    for tp_rank in range(1, folder.tp):
        states.append(rank_state(folder, tp_rank, files, options, states[0].shared))
    _require_one_save(states)
    layouts = Layouts(states[0].info)
    ties = _ties(states)
    found: dict[str, Merged | _Torn | str] = {}
    for names in _by_tensor(states, ties):
        found.update(dict.fromkeys(names, _whole_or_reason(names, states, layouts, files)))
    tensors = {name: one for name, one in found.items() if isinstance(one, Merged)}
    unread = dict.fromkeys(folder.experts, "weights of experts in files of their own are not read")
    unread |= {name: one for name, one in found.items() if isinstance(one, str)}
    torn = {name: one.ranks for name, one in found.items() if isinstance(one, _Torn)}
    ties = tuple(tied for tied in ties if tied <= tensors.keys())
    description = _description(states) + rounding_note(states, files)
    return TableCheckpoint(files, description, tensors, read_config(root, files), ties, unread, torn)


@dataclass(frozen=True, slots=True)
class _Torn:
    """A replicated tensor whose copies are not alike; `ranks` says which."""

    ranks: str


def _whole_or_reason(
    names: Sequence[str], states: Sequence[RankState], layouts: Layouts, files: Files
) -> Merged | _Torn | str:
    """Return the tensor of these tied names, or why it cannot be put together."""
    try:
        shards = [_shard(names, state) for state in states]
        merged = _merged(names, shards, None if names[0] in states[0].buffers else layouts)
        whole = merged or _replicated(shards)
    except LayoutError as reason:
        return str(reason)
    differing = whole.differing_ranks(files)
    if not differing:
        return whole
    told = f"mp ranks {differing[0]} and {differing[1]} hold different copies of it"
    return _Torn(told) if merged else f"{told}, and the files do not say how it was cut"


def _shard(names: Sequence[str], state: RankState) -> Shard:
    for name in names:
        if name in state.unread:
            raise LayoutError(state.unread[name])
    shard = state.shards.get(names[0])
    if shard is None:
        raise LayoutError(f"{state.path.name} does not hold it")
    return shard


def _merged(names: Sequence[str], shards: Sequence[Shard], layouts: Layouts | None) -> Merged | None:
    """Return the tensor of these tied names, or None where the files do not say how it was cut.

    Raises:
        LayoutError: What they say cannot be followed.
    """
    dtypes = {shard.dtype for shard in shards if shard.numel}
    if len(dtypes) > 1:
        raise LayoutError(f"mp ranks hold it as {' and '.join(sorted(map(str, dtypes)))}")
    if len(shards) == 1 or layouts is None:
        return _replicated(shards)
    return next((found for name in names if (found := layouts.merged(name, shards))), None)


def _replicated(shards: Sequence[Shard]) -> Merged:
    if len({shard.shape for shard in shards}) > 1:
        raise LayoutError("mp ranks hold different shapes of it, and the files do not say how it was cut")
    return Merged.replicated(shards)


def _require_one_save(states: Sequence[RankState]) -> None:
    first = states[0]
    for state in states[1:]:
        for key, value in first.facts.items():
            if state.facts.get(key) != value:
                raise CheckpointError(
                    f"{state.path} has {key} {shortened(state.facts.get(key))}, and {first.path.name} has "
                    f"{shortened(value)}: they are of different saves."
                )
        if state.info != first.info:
            raise CheckpointError(f"{state.path} and {first.path.name} do not say alike how the parameters were cut.")
    for key in ("mp_world_size", "tp_degree"):
        if first.facts.get(key) not in (None, len(states)):
            raise CheckpointError(
                f"{first.path.parent} holds model states of {len(states)} mp ranks, and was saved with "
                f"{key} {shortened(first.facts[key])}."
            )


def _ties(states: Sequence[RankState]) -> tuple[frozenset[str], ...]:
    """Return names that are one tensor on every rank."""
    groups: dict[str, set[str]] = {}
    for alias, name in states[0].ties.items():
        if all(name in state.shards and state.shards.get(alias) == state.shards[name] for state in states):
            groups.setdefault(name, {name}).add(alias)
    return tuple(map(frozenset, groups.values()))


def _by_tensor(states: Sequence[RankState], ties: Sequence[frozenset[str]]) -> Iterator[tuple[str, ...]]:
    """Yield the names of each tensor, in the order of the first rank's module."""
    tied = {name: group for group in ties for name in group}
    done: set[str] = set()
    order = dict.fromkeys(name for state in states for name in (*state.shards, *state.unread))
    for name in order:
        if name not in done:
            names = tuple(one for one in order if one in tied[name]) if name in tied else (name,)
            done.update(names)
            yield names


def _description(states: Sequence[RankState]) -> str:
    first = states[0]
    writer = f"DeepSpeed {first.version}" if first.version else "DeepSpeed"
    sizes = f"tp {len(states)}" + (f", dp {first.num_dp}" if first.num_dp > 1 else "")
    if first.stage is None:
        return f"{writer} training checkpoint, {sizes}: the module's weights"
    return f"{writer} training checkpoint, {sizes}, ZeRO {first.stage}: the optimizer's float32 weights"
