"""What training saves beside the model, as named tensors and values: optimizer, scheduler, counts, generators.

The objects come from `torch_files.load`, so that no class in them is created: an object counts by what was pickled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from tpcheck.backends.checkpoint_format import NUMBERED, STEP, TrainingStates, Value
from tpcheck.checkpoints.formats.file_checkpoint import ChunkedTensor, FileCheckpoint, TensorInFiles
from tpcheck.checkpoints.formats.files import Files, is_sizes, shortened
from tpcheck.checkpoints.formats.storage_view import StorageView
from tpcheck.checkpoints.formats.unpickler import Global, PickledObject
from tpcheck.core.placement import ranks_of_cut

CLASSES = (
    *("numpy.ndarray", "numpy.dtype", "numpy.*core.multiarray._reconstruct", "numpy.*core.multiarray.scalar"),
    *("torch.distributed.tensor.*", "torch.distributed._tensor.*", "torch.distributed.device_mesh.*"),
    *("torch.distributed._mesh_layout.*", "torch.optim.*", "collections.defaultdict", "argparse.Namespace"),
    *("deepspeed.*", "megatron.core.*"),
)
"""Classes in the states that PyTorch, numpy's generators, DeepSpeed and Megatron save; none of them is created."""

COUNT = "number of steps"
"""The name of the count that DeepSpeed, the Trainer and Megatron save as global_steps, global_step and iteration."""

_COUNTS = ("global_step", "global_steps", "iteration", "step", "num_steps")
_MAX_DEPTH = 12  # of nested containers; generators and schedulers have 3
_MAX_LISTED = 8  # numbers of a list that are values each; longer lists, such as a generator's 625 words, have a digest
# How a step is computed, not what it computes; names of parameters are matched, and their numbers depend on the order.
_NOT_COMPARED = {
    *("params", "param_names", "foreach", "fused", "capturable", "differentiable", "pg_index", "max_lr", "min_lr"),
}
_DTENSOR = "torch._utils._rebuild_wrapper_subclass"


@dataclass(slots=True)
class StateTable:
    """Tensors and values, as they are found."""

    tensors: dict[str, TensorInFiles] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    partial: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def states(self, files: Files) -> TrainingStates | None:
        """Return what was found, or None where that is nothing."""
        if not self.tensors and not self.values:
            return None
        tensors = FileCheckpoint(files, "training states", self.tensors, unread=self.unread)
        return TrainingStates(tensors, self.values, self.partial)

    def add(self, name: str, value: Any, files: Files, depth: int = 0) -> None:
        """Add all that is in a value under names that start with this one."""
        if isinstance(value, (StorageView, ChunkedTensor)):
            self._add_tensor(name, value, files)
        elif value is None or isinstance(value, (bool, int, float)):
            self.values[name] = value
        elif isinstance(value, str):
            self.values[name] = value if len(value) <= 200 else _digest(value)
        elif isinstance(value, PickledObject) and value.name == _DTENSOR:
            self._add_dtensor(name, value)
        else:
            entries = _entries(value)
            if depth >= _MAX_DEPTH:
                self.unread[name] = "it is nested too deeply"
            elif entries is None:
                self.values[name] = _digest(value)
            else:
                for key, entry in entries.items():
                    self.add(f"{name}.{_key(key)}", entry, files, depth + 1)

    def _add_tensor(self, name: str, tensor: StorageView | ChunkedTensor, files: Files) -> None:
        if prod(tensor.shape) == 1 and tensor.dtype.itemsize <= 8:
            self.values[name] = tensor.read(files, range(1)).reshape(()).item()
        else:
            self.tensors[name] = tensor

    def _add_dtensor(self, name: str, value: PickledObject) -> None:
        states = value.state if isinstance(value.state, tuple) else (value.state,)  # of __dict__, then of __slots__
        local = next((state.get("_local_tensor") for state in states if isinstance(state, Mapping)), None)
        shape = value.arguments[2] if len(value.arguments) > 2 else None
        if not isinstance(local, StorageView) or not is_sizes(shape):
            self.unread[name] = "is a DTensor without its local tensor"
            return
        self.tensors[name] = local
        if local.shape != tuple(shape):
            self.partial[name] = tuple(shape)

    def add_optimizer(
        self, state_dict: Mapping[Any, Any], files: Files, model: Mapping[str, tuple[int, ...]], *, label: str = ""
    ) -> None:
        """Add an optimizer's state dict.

        Args:
            model: Shapes of the model's parameters in its order, to name parameters that have numbers; may be empty.
            label: What its names start with, where there are several optimizers.
        """
        groups, by_parameter = state_dict.get("param_groups"), state_dict.get("state")
        self.add_groups(groups, files, label=label)
        of_parameters = by_parameter if isinstance(by_parameter, Mapping) else {}
        names = _parameter_names(groups, of_parameters, model)
        steps: dict[str, Any] = {}
        for key, kinds in of_parameters.items():
            for kind, value in kinds.items() if isinstance(kinds, Mapping) else ():
                name = names.get(key) or _key(key)
                if kind == "step":
                    one = StateTable()
                    one.add(name, value, files)
                    steps |= one.values
                else:
                    self.add(f"{label}{name} {_key(kind)}", value, files, 1)
        self.add_steps(steps, label=label)

    def add_groups(self, groups: Any, files: Files, *, label: str = "") -> None:
        """Add the options of the parameter groups."""
        numbered = groups.items() if isinstance(groups, Mapping) else enumerate(groups or ())
        for number, group in numbered if isinstance(groups, (Mapping, list, tuple)) else ():
            for key, value in group.items() if isinstance(group, Mapping) else ():
                if key not in _NOT_COMPARED:
                    self.add(f"{label}optimizer group {_key(number)} {_key(key)}", value, files, 1)

    def add_steps(self, steps: Mapping[str, Value], *, label: str = "") -> None:
        """Add the optimizer's step counts, by parameter or by group."""
        counts = {name: float(count) for name, count in steps.items() if isinstance(count, (int, float))}
        self.values |= {f"{label}{name}{STEP}": count for name, count in counts.items()}

    def add_entries(self, entries: Mapping[Any, Any], files: Files, model: Mapping[str, tuple[int, ...]]) -> None:
        """Add entries of a file by the trainer's own keys, each under the name that other formats have for it."""
        optimizers = [key for key, value in entries.items() if is_optimizer(value)]
        for key, value in entries.items():
            if key in optimizers:
                label = "" if len(optimizers) == 1 else f"{_key(key)} "
                self.add_optimizer(value, files, model, label=label)
            elif key in _COUNTS:
                self.add(COUNT, value, files)
            else:
                self.add(_usual_name(_key(key)), value, files)


def is_optimizer(value: Any) -> bool:
    """Return whether this is the state dict of an optimizer of torch."""
    return (
        isinstance(value, Mapping) and isinstance(value.get("state"), Mapping) and {*value} <= {"state", "param_groups"}
    )


def nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return nested mappings of values by the keys that lead to them."""
    root: dict[str, Any] = {}
    for path, value in flat.items():
        inner = root
        for key in path[:-1]:
            deeper = inner.setdefault(key, {})
            if not isinstance(deeper, dict):
                break
            inner = deeper
        else:
            inner[path[-1]] = value
    return root


def _usual_name(key: str) -> str:
    if "sched" in key:
        return "scheduler"
    if "scaler" in key:
        return "scaler"
    return "generators" if re.search(r"(^|_)rng(_|$)|random_state|generator", key) else key


def _parameter_names(
    groups: Any, of_parameters: Mapping[Any, Any], model: Mapping[str, tuple[int, ...]]
) -> dict[Any, str]:
    """Return the name for each key: by the groups' own names, or by the model's order where all shapes agree."""
    listed = groups.values() if isinstance(groups, Mapping) else groups
    names: dict[Any, str] = {}
    for group in listed if isinstance(groups, (Mapping, list, tuple)) else ():
        numbers, given = (group.get(key) if isinstance(group, Mapping) else None for key in ("params", "param_names"))
        if isinstance(numbers, (list, tuple)) and isinstance(given, (list, tuple)) and len(numbers) == len(given):
            names |= {number: name for number, name in zip(numbers, given, strict=True) if isinstance(name, str)}
    numbers = [key for key in of_parameters if type(key) is int]
    if names or len(numbers) != len(of_parameters):
        return names
    if len(model) == len(numbers) and _are_in_order(
        [_shapes(of_parameters[number]) for number in sorted(numbers)], [*model.values()]
    ):
        return dict(zip(sorted(numbers), model, strict=True))
    return {number: f"{NUMBERED}{number}" for number in numbers}


def _are_in_order(shapes: Sequence[set[tuple[int, ...]]], weights: Sequence[tuple[int, ...]]) -> bool:
    """Return whether each parameter's tensors have the shape of its weight, or of a shard for one number of ranks."""
    cut = {
        ranks_of_cut(shape, weight)
        for of_parameter, weight in zip(shapes, weights, strict=True)
        for shape in of_parameter
        if shape != weight
    }
    return not cut or (len(cut) == 1 and None not in cut)


def _shapes(kinds: Any) -> set[tuple[int, ...]]:
    values = kinds.values() if isinstance(kinds, Mapping) else ()
    return {value.shape for value in values if isinstance(value, StorageView) and value.shape}


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """Return what is in a container or an object by its keys, or None for what counts as one value."""
    if isinstance(value, PickledObject) and isinstance(value.state, Mapping) and not value.entries:
        return value.state
    if isinstance(value, (list, tuple)) and not _is_long(value):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else None


def _is_long(values: Sequence[Any]) -> bool:
    return len(values) > _MAX_LISTED and all(isinstance(value, (int, float)) for value in values)


def _key(key: Any) -> str:
    return key if isinstance(key, str) and key.isprintable() else shortened(key, 60)


def _digest(value: Any) -> str:
    """Return a text that is the same for equal contents of containers and objects."""
    digest = hashlib.sha256()
    _feed(digest, value, 0)
    return f"sha256 {digest.hexdigest()[:16]}"


def _feed(digest: Any, value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        return
    if isinstance(value, PickledObject):
        if value.name.endswith("multiarray._reconstruct"):  # of numpy.core or numpy._core, by version
            parts: tuple[Any, ...] = ("ndarray", value.state[1:] if isinstance(value.state, tuple) else value.state)
        else:
            parts = (value.name, value.arguments, value.state, value.entries, value.elements)
        _feed(digest, parts, depth + 1)
    elif isinstance(value, Global):
        digest.update(value.name.rpartition(".")[2].encode())
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            digest.update(f"{key!r}:".encode())
            _feed(digest, entry, depth + 1)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for entry in value:
            _feed(digest, entry, depth + 1)
    elif isinstance(value, (bytes, bytearray)):
        digest.update(value)
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())
