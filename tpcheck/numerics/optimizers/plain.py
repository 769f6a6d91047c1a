"""The view of torch's optimizers, on which those of DeepSpeed and Megatron build: tensors that are stepped, and where
the named parameters lie in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch

from tpcheck.backends.live_groups import LiveGroups, live_groups
from tpcheck.core.errors import UsageError
from tpcheck.numerics.global_index import GlobalIndex
from tpcheck.numerics.optimizer_view import ParameterGroup, Part
from tpcheck.numerics.optimizers.indices import fragment_of, index_of_dtensor, is_dtensor, read_indices
from tpcheck.numerics.optimizers.names import unwrapped, unwrapped_names

_Kind = Literal["gradient", "accumulated", "weight", "master", "state"]


@dataclass(frozen=True, slots=True)
class Slice:
    """Where elements of one parameter lie in a flattened tensor that an optimizer steps.

    Attributes:
        name: Of the parameter, without wrappers.
        start: The first element in the stepped tensor.
        first: The first element in the flattened parameter of this TP rank.
        numel: How many.
    """

    name: str
    start: int
    first: int
    numel: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """A tensor that an optimizer steps: a parameter, a copy of it in float32, or a flat partition of many.

    Attributes:
        tensor: What lies in `param_groups` of the torch optimizer while it steps.
        slices: The parameters in it, or parts of them.
        is_master: It is a copy of weights of another dtype.
    """

    tensor: torch.Tensor
    slices: tuple[Slice, ...]
    is_master: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of `param_groups`.

    Attributes:
        optimizer: The torch optimizer.
        options: Its entry of `param_groups`.
        stepped: What is stepped by these options.
        names: All of the group's parameters that are known here, those whose partition is elsewhere included.
    """

    optimizer: torch.optim.Optimizer
    options: Mapping[str, Any]
    stepped: tuple[Stepped, ...]
    names: tuple[str, ...]


class TorchView:
    """Torch's optimizers over a plain, DTensor or FSDP2 model, in DistributedDataParallel or not."""

    weights_follow_the_hook = False

    def __init__(self, model: Any, optimizer: Any, groups: LiveGroups | None) -> None:
        module = self._module = unwrapped(model)
        if any(type(each).__name__ == "FullyShardedDataParallel" for each in modules_of(model)):
            raise UsageError(
                "model", "FullyShardedDataParallel", "fully_shard (FSDP2), whose parameters keep their shapes"
            )
        self._groups_of_ranks = groups if groups is not None else _found_groups(module)
        names = unwrapped_names(name for name, _ in module.named_parameters(remove_duplicate=False))
        # A tied parameter has the first of its names.
        self._parameters = {names[name]: parameter for name, parameter in module.named_parameters()}
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        read = read_indices(module, self._groups_of_ranks)
        self._indices = {names[name]: index for name, index in read.items()}
        self._dtensor_indices: dict[Any, GlobalIndex | None] = {}
        self._fragments: dict[tuple[str, int, int], GlobalIndex] = {}
        self._not_viewed: dict[str, str] = {}
        self._num_skipped = 0
        self._wrappers = _as_sequence(optimizer)
        self._is_given = optimizer is not None
        self._optimizers = [torch_optimizer(wrapper) for wrapper in self._wrappers]
        if self._is_given and not any(group.names for group in self._groups()):
            raise UsageError("optimizer", type(optimizer).__name__, "an optimizer of this model's parameters")

    @property
    def stepping(self) -> tuple[torch.optim.Optimizer, ...]:
        return tuple(self._optimizers)

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        if any(optimizer is known for known in self.stepping):
            return True
        if self._is_given or torch_optimizer(optimizer) is not optimizer:  # a wrapper, whose inner one steps
            return False
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if not any(id(parameter) in self._names for parameter in parameters):
            return False
        self._optimizers.append(optimizer)
        return True

    def gradients(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Part]:
        now = (
            None
            if optimizer is None
            else {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        )
        if optimizer is not None and _has_found_inf(optimizer):
            self._num_skipped += 1
        for group in self._groups():
            if optimizer is not None and group.optimizer is not optimizer:
                continue
            scale = _remaining_scale(group.optimizer)
            for stepped in group.stepped:
                gradient = gradient_of(stepped.tensor)
                if gradient is not None and (now is None or id(stepped.tensor) in now):
                    for part in self._parts("gradient", "", gradient, stepped):
                        yield replace(part, scale=part.scale * scale)

    def weights(self) -> Iterator[Part]:
        for name, parameter in self._parameters.items():
            yield self._part("weight", name, "", parameter)

    def states(self) -> Iterator[Part]:
        for group in self._groups():
            for stepped in group.stepped:
                if stepped.is_master:
                    yield from self._parts("master", "", stepped.tensor, stepped)
                for state, value in group.optimizer.state.get(stepped.tensor, {}).items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool):
                        value = torch.tensor(value, dtype=torch.float64)
                    if isinstance(value, torch.Tensor):
                        yield from self._parts("state", str(state), value, stepped)

    def groups(self) -> tuple[ParameterGroup, ...]:
        return tuple(
            ParameterGroup(type(group.optimizer).__name__, _plain_options(group.options), group.names)
            for group in self._groups()
        )

    def accumulated(self) -> Iterator[Part]:
        for name, parameter in self._parameters.items():
            gradient = gradient_of(parameter)
            if gradient is not None:
                yield self._part("accumulated", name, "", gradient)

    def is_discarded(self) -> bool:
        gradients = [gradient_of(parameter) for parameter in self._parameters.values() if parameter.requires_grad]
        if any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            return False
        return not _has_unreduced_gradients(self._module)

    def supports_replays(self) -> str:
        return ""

    def reported_norm(self) -> float | None:
        return None

    def loss_scale(self) -> float:
        """Return the scale of an accelerate optimizer's GradScaler; a loop's own scaler is not known here."""
        scalers = [scaler for wrapper in self._wrappers if (scaler := getattr(wrapper, "scaler", None)) is not None]
        return float(scalers[0].get_scale()) if scalers else 1.0

    def num_skipped(self) -> int:
        """Return how often a fused optimizer was called with infinite gradients: its kernel then does nothing."""
        return self._num_skipped

    def not_viewed(self) -> Mapping[str, str]:
        return self._not_viewed

    def _groups(self) -> Iterator[Group]:
        for optimizer in self.stepping:
            for options in optimizer.param_groups:
                stepped = tuple(
                    Stepped(parameter, (Slice(self._names[id(parameter)], 0, 0, parameter.numel()),))
                    for parameter in options["params"]
                    if id(parameter) in self._names
                )
                yield Group(optimizer, options, stepped, tuple(item.slices[0].name for item in stepped))

    def _parts(self, kind: _Kind, state: str, tensor: torch.Tensor, stepped: Stepped) -> Iterator[Part]:
        """Yield the parts of named parameters in a tensor that belongs to a stepped one: it, its gradient, a moment."""
        for slice_ in stepped.slices:
            is_flat = tensor.shape == stepped.tensor.shape != self.local_shape(slice_.name)
            if is_dtensor(tensor) or not is_flat:  # also a step count, factors of a moment
                yield self._part(kind, slice_.name, state, tensor)
            else:
                flat = tensor.detach().reshape(-1)[slice_.start : slice_.start + slice_.numel]
                yield self._fragment(kind, slice_.name, state, flat, slice_.first)

    def _part(self, kind: _Kind, name: str, state: str, tensor: torch.Tensor) -> Part:
        """Return the part that a tensor of the local shape, a DTensor, or a statistic of another shape is."""
        tensor = tensor.detach()
        if is_dtensor(tensor):
            return self._part_of_dtensor(kind, name, state, tensor)
        if tensor.is_sparse:  # of an embedding made with sparse=True; the only values that are copied
            tensor = tensor.to_dense()
        if tensor.shape == self.local_shape(name):
            return Part(kind, name, state, tensor, self._indices.get(name))
        return Part(kind, name, state, tensor, GlobalIndex.whole(()) if tensor.dim() == 0 else None)

    def _part_of_dtensor(self, kind: _Kind, name: str, state: str, tensor: Any) -> Part:
        key = (tensor.device_mesh, tensor.placements, tuple(tensor.shape))
        if key not in self._dtensor_indices:
            self._dtensor_indices[key] = index_of_dtensor(tensor)
        index = self._dtensor_indices[key]
        partial = [dim for dim, placement in enumerate(tensor.placements) if placement.is_partial()]
        means = [dim for dim in partial if getattr(tensor.placements[dim], "reduce_op", "sum") == "avg"]
        values = tensor._local_tensor
        if type(values) not in (torch.Tensor, torch.nn.Parameter):  # on its way from a collective
            with torch.no_grad():
                values = tensor.to_local()
        return Part(
            kind,
            name,
            state,
            values,
            index if self._covers_tp(tensor.device_mesh) else None,
            is_term=bool(partial),
            scale=1.0 / prod(tensor.device_mesh.size(dim) for dim in means),
            index_in_shard=None if self._covers_tp(tensor.device_mesh) else index,
        )

    def _covers_tp(self, mesh: Any) -> bool:
        """Return whether the mesh has all ranks of the TP group; FSDP2 puts plain parameters on a mesh of DP alone."""
        groups = self._groups_of_ranks
        return groups is None or set(groups.tp) <= set(mesh.mesh.flatten().tolist())

    def _fragment(self, kind: _Kind, name: str, state: str, flat: torch.Tensor, first: int) -> Part:
        """Return the part that elements of a flattened parameter are, from the one numbered `first`."""
        shape, index = self.local_shape(name), self._indices.get(name)
        numel = len(flat)
        if numel == prod(shape):
            return Part(kind, name, state, flat.reshape(shape), index)
        key = (name, first, numel)
        if key not in self._fragments:  # what is derived from an index is kept with it
            self._fragments[key] = fragment_of(index or GlobalIndex.whole(shape), first, first + numel)
        if index is not None:
            return Part(kind, name, state, flat, self._fragments[key])
        return Part(kind, name, state, flat, None, index_in_shard=self._fragments[key])

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that this TP rank's shard of a parameter has where it is not partitioned over DP."""
        parameter = self._parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))


def modules_of(model: Any) -> Iterator[Any]:
    """Yield the wrappers of a model, outermost first, and its modules."""
    while model is not None and not isinstance(model, torch.nn.Module):
        yield model
        model = getattr(model, "module", None)
    if model is not None:
        yield from model.modules()


def gradient_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the gradient that an optimizer steps by; Megatron gives Transformer Engine's one of another dtype."""
    gradient: torch.Tensor | None = getattr(tensor, "decoupled_grad", None)
    return tensor.grad if gradient is None else gradient


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside wrappers, such as accelerate's, or torch's ZeroRedundancyOptimizer (`optim`).

    Raises:
        UsageError: There is none.
    """
    inner = optimizer
    while (wrapped := getattr(inner, "optimizer", None) or getattr(inner, "optim", None)) is not None:
        inner = wrapped
    if not isinstance(inner, torch.optim.Optimizer):
        raise UsageError("optimizer", type(optimizer).__name__, "a torch optimizer, several, or an engine's")
    return inner


def _as_sequence(optimizer: Any) -> Sequence[Any]:
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, Iterable) else (optimizer,)


def _found_groups(module: torch.nn.Module) -> LiveGroups | None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return LiveGroups(0, (0,), (0,), "one process")
    with suppress(UsageError):
        return live_groups(model=module)
    return None


def _remaining_scale(optimizer: torch.optim.Optimizer) -> float:
    """Return what gradients are still to be multiplied by.

    `GradScaler.step` unscales gradients before the optimizer's hooks, except for fused optimizers, which get the scale
    in `grad_scale` and unscale in their kernel (torch/amp/grad_scaler.py:step at 2.13).
    """
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else 1.0 / float(scale)


def _has_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a GradScaler has found the gradients of a fused optimizer infinite."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {str(name): _plain(value) for name, value in options.items() if name not in ("params", "param_names")}
    return {name: value for name, value in plain.items() if value is not _NOT_PLAIN}


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """Return numbers, texts, bools, None and tuples of these; a tensor of one element as its number."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and not is_dtensor(value) else _NOT_PLAIN
    if isinstance(value, (list, tuple)):
        items = tuple(_plain(item) for item in value)
        return _NOT_PLAIN if _NOT_PLAIN in items else items
    return value if value is None or isinstance(value, (bool, int, float, str)) else _NOT_PLAIN


def _has_unreduced_gradients(model: Any) -> bool:
    """Return whether FSDP2 keeps gradients of micro-batches to itself, after `set_requires_gradient_sync(False)`.

    They are in no parameter until a later micro-batch reduces them, and nothing public tells of them.
    """
    states = [module._get_fsdp_state() for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    for state in states:
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in (each for group in groups if group is not None for each in group.fsdp_params):
            unsharded = getattr(parameter, "_unsharded_param", None)
            of_autograd = None if unsharded is None else unsharded.grad
            if of_autograd is not None or getattr(parameter, "unsharded_accumulated_grad", None) is not None:
                return True
    return False
