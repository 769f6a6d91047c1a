"""DeepSpeed universal checkpoints: `zero/<name>/fp32.pt` holds each parameter whole, whatever it was trained on.

Beside them lie the model states of the run that was converted: they say the names of buffers, what is tied, and the
shapes that the conversion of ZeRO 3 without tensor parallelism leaves out (deepspeed/checkpoint/ds_to_universal.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.deepspeed.folder import is_sizes, mapping, sequence, step_folder
from tpcheck.checkpoints.formats.deepspeed.shards import Merged, Segment, Shard
from tpcheck.checkpoints.formats.files import Files, as_path, inside, is_folder, is_present, names_in, shortened
from tpcheck.checkpoints.formats.json_files import read_config
from tpcheck.checkpoints.formats.stored import StoredTensor
from tpcheck.checkpoints.formats.table import TableCheckpoint, TensorInFiles
from tpcheck.checkpoints.formats.torch_files import load
from tpcheck.core.errors import CheckpointError

POINTER = "latest_universal"
PARAMETERS = "zero"
WEIGHTS = "fp32.pt"
STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_DEEPSPEED = ("deepspeed.*",)


class UniversalFormat:
    """Opens what `ds_to_universal` wrote, and the folder above it, whose `latest_universal` names it."""

    name = "deepspeed-universal"
    precedence = 45  # above deepspeed-training, whose model states lie in it

    def recognises(self, source: Any) -> bool:
        path = as_path(source)
        if path is None or not is_folder(path):
            return False
        is_root = is_present(path / POINTER) and not is_present(path / "latest")
        return is_root or any(is_present(path / PARAMETERS / name / WEIGHTS) for name in names_in(path / PARAMETERS))

    def open(self, source: Any, options: ReadOptions) -> TableCheckpoint:
        files = Files()
        try:
            root = Path(source)
            folder = root if is_folder(root / PARAMETERS) else step_folder(root, files, POINTER)
            return _opened(root, folder, files, options)
        except BaseException:
            files.close()
            raise


@dataclass(frozen=True, slots=True)
class _States:
    """What the model states say.

    Attributes:
        shapes: Of parameters, where one rank held them whole.
        buffers: Tensors that no optimizer holds.
        ties: Names by the name of the parameter that they share.
        frozen: Names of parameters that ZeRO 3 keeps in fragments, since no optimizer holds them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, StoredTensor]
    ties: Mapping[str, str]
    frozen: tuple[str, ...]


def _opened(root: Path, folder: Path, files: Files, options: ReadOptions) -> TableCheckpoint:
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
        frozenset({name, *(alias for alias, other in tied.items() if other == name)})
        for name in dict.fromkeys(tied.values())
    )
    unread = dict.fromkeys(
        (name for name in states.frozen if name not in tensors),
        "it is frozen, and the conversion of ZeRO 3 leaves it out",
    )
    replaced = [alias for alias in tied if alias in names]
    note = f"; {', '.join(replaced[:3])} as tied, not from files of their own" if replaced else ""
    return TableCheckpoint(
        files, f"DeepSpeed universal checkpoint{note}", tensors, read_config(root, files), groups, unread
    )


def _parameter(folder: Path, name: str, states: _States, files: Files, options: ReadOptions) -> TensorInFiles:
    path = inside(folder, f"{PARAMETERS}/{name}/{WEIGHTS}")
    held = load(path, files, options, inert=_DEEPSPEED)
    tensor = held.get("param") if isinstance(held, Mapping) else held
    if not isinstance(tensor, StoredTensor):
        raise CheckpointError(f"{path} holds no tensor under 'param'.")
    shape = states.shapes.get(name)
    if isinstance(held, Mapping) or shape is None or len(tensor.shape) != 1:
        return tensor
    if prod(shape) != prod(tensor.shape):
        raise CheckpointError(f"{path} has {prod(tensor.shape)} elements, and the model states say {list(shape)}.")
    return Merged.replicated([Shard(shape, tensor.dtype, (Segment(tensor, 0, prod(shape)),))])


def _states(folder: Path, files: Files, options: ReadOptions) -> _States:
    path = next((folder / name for name in STATES if is_present(folder / name)), None)
    if path is None:
        return _States({}, {}, {}, ())
    state = load(path, files, options, inert=_DEEPSPEED)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds no state of DeepSpeed, but an object of type {type(state).__name__}.")
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
        if isinstance(name, str) and isinstance(module.get(name), StoredTensor)
    }
    ties = {}
    for alias, name in mapping(state.get("shared_params")).items():
        if not isinstance(alias, str) or not isinstance(name, str):
            raise CheckpointError(f"{path} has shared_params that are no names: {shortened(alias)}.")
        ties[alias] = name
    frozen = tuple(name for name in mapping(state.get("frozen_param_shapes")) if isinstance(name, str))
    return _States(shapes, buffers, ties, frozen)
