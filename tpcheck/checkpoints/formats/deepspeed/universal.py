"""DeepSpeed universal checkpoints: `zero/<name>/fp32.pt` holds each parameter in full.

Beside them are the model states of the run that was converted. They state the names of buffers, the ties, and the
shapes that the conversion of ZeRO 3 without tensor parallelism leaves out (deepspeed/checkpoint/ds_to_universal.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions, TrainingStates
from tpcheck.checkpoints.formats.deepspeed.merge_tp_shards import MergedTensor, Shard
from tpcheck.checkpoints.formats.deepspeed.rank_files import mapping, sequence, step_folder
from tpcheck.checkpoints.formats.deepspeed.rank_state import CLASSES, load_states
from tpcheck.checkpoints.formats.deepspeed.training import add_common_states
from tpcheck.checkpoints.formats.file_checkpoint import FileCheckpoint, TensorInFiles
from tpcheck.checkpoints.formats.files import (
    Files,
    inside,
    is_folder,
    is_present,
    is_sizes,
    names_in,
    read_config,
    shortened,
)
from tpcheck.checkpoints.formats.storage_view import StorageView
from tpcheck.checkpoints.formats.torch_files import load
from tpcheck.checkpoints.formats.training_states import StateTable
from tpcheck.core.errors import CheckpointError

POINTER = "latest_universal"
PARAMETERS = "zero"
WEIGHTS = "fp32.pt"
OPTIMIZER = "optimizer_state.pt"
STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


class UniversalFormat:
    """Opens a folder of `ds_to_universal`, or the folder above it, whose `latest_universal` names it."""

    name = "deepspeed-universal"
    precedence = 45  # above deepspeed-training, whose model states it holds, too

    def recognises(self, source: Any) -> bool:
        if not is_folder(source):
            return False
        is_root = is_present(source / POINTER) and not is_present(source / "latest")
        parameters = source / PARAMETERS
        return is_root or any(is_present(parameters / name / WEIGHTS) for name in names_in(parameters))

    def open(self, source: Any, options: ReadOptions) -> FileCheckpoint:
        with Files() as files:
            root = source
            folder = root if is_folder(root / PARAMETERS) else step_folder(root, files, POINTER)
            return _open(root, folder, files, options)


@dataclass(frozen=True, slots=True)
class _States:
    """What the model states add to the parameters.

    Attributes:
        shapes: Shapes of parameters, where one rank held each in full.
        buffers: The buffers by name.
        ties: The name of a parameter for each further name of it.
        frozen: Names of frozen parameters, which ZeRO 3 keeps in fragments.
        model_states: The whole file.
    """

    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, StorageView]
    ties: Mapping[str, str]
    frozen: tuple[str, ...]
    model_states: Mapping[Any, Any]


def _open(root: Path, folder: Path, files: Files, options: ReadOptions) -> FileCheckpoint:
    states = _states(folder, files, options)
    names = [name for name in names_in(folder / PARAMETERS) if is_folder(folder / PARAMETERS / name)]
    if not names:
        raise CheckpointError(f"{folder} holds no parameters in its folder {PARAMETERS!r}.")
    tensors: dict[str, TensorInFiles] = {
        name: _parameter(folder, name, states, files, options)
        for name in names
        if name not in states.ties and name not in states.buffers
    }
    tensors |= states.buffers
    tied = {alias: name for alias, name in states.ties.items() if name in tensors}
    tensors |= {alias: tensors[name] for alias, name in tied.items()}
    groups = tuple(
        frozenset({name, *(alias for alias, tied_name in tied.items() if tied_name == name)})
        for name in dict.fromkeys(tied.values())
    )
    unread = dict.fromkeys(
        (name for name in states.frozen if name not in tensors),
        "it is frozen, and the conversion of ZeRO 3 leaves it out",
    )
    replaced = [alias for alias in tied if alias in names]
    note = f"; {', '.join(replaced[:3])} read as tied, not from separate files" if replaced else ""
    return FileCheckpoint(
        files,
        f"DeepSpeed universal checkpoint{note}",
        tensors,
        read_config(root, files),
        groups,
        unread,
        read_states=lambda: _training_states(folder, names, states, files, options),
    )


def _training_states(
    folder: Path, names: Sequence[str], states: _States, files: Files, options: ReadOptions
) -> TrainingStates | None:
    table = StateTable()
    steps: dict[str, Any] = {}
    for name in (name for name in names if name not in states.ties and name not in states.buffers):
        for file in names_in(folder / PARAMETERS / name):
            kind = file.removesuffix(".pt")
            if file == "step.pt":
                steps[name] = load(inside(folder, f"{PARAMETERS}/{name}/{file}"), files, options, keep=CLASSES)
            elif file != WEIGHTS and kind != file:
                table.tensors[f"{name} {kind}"] = _parameter(folder, name, states, files, options, file)
    table.add_optimizer({"state": {name: {"step": step} for name, step in steps.items()}}, files, {})
    common = folder / PARAMETERS / OPTIMIZER
    if is_present(common):
        saved = mapping(load(common, files, options, keep=CLASSES))
        table.add_groups(saved.get("param_groups"), files)
        table.add("scaler", saved.get("loss_scaler"), files)
    add_common_states(table, states.model_states, files)
    return table.states(files)


def _parameter(
    folder: Path, name: str, states: _States, files: Files, options: ReadOptions, file: str = WEIGHTS
) -> TensorInFiles:
    path = inside(folder, f"{PARAMETERS}/{name}/{file}")
    saved = load(path, files, options, keep=CLASSES)
    tensor = saved.get("param") if isinstance(saved, Mapping) else saved
    if not isinstance(tensor, StorageView):
        raise CheckpointError(f"{path} holds no tensor under 'param'.")
    shape = states.shapes.get(name)
    if isinstance(saved, Mapping) or shape is None or len(tensor.shape) != 1:
        return tensor
    if prod(shape) != prod(tensor.shape):
        raise CheckpointError(
            f"{path} has {prod(tensor.shape)} elements, but the model states state the shape {list(shape)}."
        )
    return MergedTensor.replicated([replace(Shard.of(tensor), shape=shape)])


def _states(folder: Path, files: Files, options: ReadOptions) -> _States:
    path = next((folder / name for name in STATES if is_present(folder / name)), None)
    if path is None:
        return _States({}, {}, {}, (), {})
    state = load_states(path, files, options)
    degree = mapping(state.get("checkpoint_parallel_dimensions")).get("tp_degree", state.get("mp_world_size"))
    shapes = {
        name: tuple(shape)
        for group in sequence(state.get("param_shapes"))
        for name, shape in mapping(group).items()
        if isinstance(name, str) and is_sizes(shape) and degree == 1
    }
    module = mapping(state.get("module"))
    buffers = {
        name: module[name]
        for name in sequence(state.get("buffer_names"))
        if isinstance(name, str) and isinstance(module.get(name), StorageView)
    }
    ties = {}
    for alias, name in mapping(state.get("shared_params")).items():
        if not isinstance(alias, str) or not isinstance(name, str):
            raise CheckpointError(f"{path} has shared_params that are not names: {shortened(alias)}.")
        ties[alias] = name
    frozen = tuple(name for name in mapping(state.get("frozen_param_shapes")) if isinstance(name, str))
    return _States(shapes, buffers, ties, frozen, state)
