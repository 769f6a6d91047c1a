"""A model in memory as a checkpoint: an `nn.Module`, a DeepSpeed engine, or a mapping of tensors."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcheck.backends.checkpoint_format import Extent, ReadOptions
from tpcheck.backends.local_part import restored_data
from tpcheck.core.errors import CheckpointError


def gather_shards(entries: Mapping[str, Any], module: nn.Module | None) -> dict[str, Any]:
    """Return the entries of a state dict with every sharded tensor gathered into CPU memory. Collective.

    Args:
        entries: A state dict, which may hold other objects than tensors.
        module: The module of the state dict, whose tensor-parallel layers know how to gather their parameters.

    Raises:
        CheckpointError: A tensor is a shard that neither torch nor DeepSpeed can gather.
    """
    layers = () if module is None else _parallel_layers(module)
    full_of = {id(parameter): full for layer in layers for parameter, full in _gather_layer(*layer)}
    gathered = dict(entries)
    for name, value in entries.items():
        if id(value) in full_of:
            gathered[name] = full_of[id(value)]
        elif _is_megatron_shard(value):
            raise CheckpointError(
                f"Parameter {name!r} is this rank's shard of a tensor-parallel parameter, "
                "which only the code that sharded it can gather: compare what it saves."
            )
        elif hasattr(value, "full_tensor"):  # a DTensor
            gathered[name] = value.full_tensor().detach().cpu()
        elif _is_sharded(value):
            with _unpartitioned([value]):
                gathered[name] = value.detach().cpu().clone()
    return gathered


def _is_sharded(value: Any) -> bool:
    """Return whether this rank holds only a part of the tensor: a DTensor, or a partition of ZeRO-3."""
    return hasattr(value, "full_tensor") or (hasattr(value, "ds_id") and hasattr(value, "ds_shape"))


def _is_megatron_shard(value: Any) -> bool:
    """Return whether the parameter has the attribute that Megatron sets on those that it shards."""
    several_ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several_ranks and bool(getattr(value, "tensor_model_parallel", False))


def _parallel_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) for each tensor-parallel layer of DeepSpeed."""
    for name, layer in module.named_modules():
        if hasattr(layer, "gather_params") and getattr(layer, "mp_group", None) is not None:
            yield name, layer


def _gather_layer(name: str, layer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (parameter, full tensor) for each parameter of the layer; a tied one is found by its identity."""
    parameters = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    present = [parameter for parameter in parameters if parameter is not None]
    with _unpartitioned(present), restored_data(present):
        for parameter in present:
            parameter.data = parameter.data.clone()  # gathering may write into it
        try:
            layer.gather_params(list(present))  # deepspeed before 0.19 crashes on None in place of a bias
        except RuntimeError as error:
            raise CheckpointError(
                f"Layer {name!r} holds a shard of its parameters that DeepSpeed cannot gather."
            ) from error
        return [(parameter, parameter.data.detach().cpu().clone()) for parameter in present]


def _unpartitioned(parameters: list[torch.Tensor]) -> Any:
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    from deepspeed import zero  # installed, since it has partitioned them

    return zero.GatheredParameters(partitioned)


class LiveFormat:
    """Reads the state dict of a model in memory, persistent buffers included, without copying it.

    Opening gathers shards (DTensors, DeepSpeed's tensor-parallel layers, ZeRO-3) into CPU memory. That is collective:
    every rank that holds a part of the model must open it.
    """

    name = "live"
    precedence = 100

    def recognises(self, source: Any) -> bool:
        return isinstance(source, nn.Module) or (
            isinstance(source, Mapping)
            and all(isinstance(name, str) for name in source)
            and any(isinstance(tensor, torch.Tensor) for tensor in source.values())
        )

    def open(self, source: Any, options: ReadOptions) -> LiveCheckpoint:
        module = _unwrapped(source) if isinstance(source, nn.Module) else None
        entries = source if module is None else module.state_dict(keep_vars=True)
        gathered = gather_shards(entries, module)
        description = "tensors in memory" if module is None else f"{type(module).__name__} in memory"
        is_gathered = any(gathered[name] is not entries[name] for name in entries)
        description += ", gathered from all ranks" if is_gathered else ""
        checkpoint = _checkpoint(description, entries, gathered, {} if module is None else _config(module), module)
        checkpoint._is_gathered = is_gathered
        return checkpoint


@dataclass(slots=True)
class LiveCheckpoint:
    """Implements `Checkpoint` over tensors in memory."""

    description: str
    config: Mapping[str, Any]
    ties: tuple[frozenset[str], ...]
    unread: Mapping[str, str]
    _tensors: dict[str, torch.Tensor]
    _versions: dict[str, int]
    _module: nn.Module | None = None
    _is_gathered: bool = False

    @property
    def inconsistent_replicas(self) -> Mapping[str, str]:
        return {}

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, rows: range) -> torch.Tensor:
        """Return a view of a model on the CPU, which must not be written to."""
        tensor = self._tensors[name].detach()
        part = tensor[rows.start : rows.stop] if tensor.ndim else tensor
        return part.resolve_conj().resolve_neg().to("cpu").contiguous()

    def extent(self, name: str) -> Extent | None:
        return None

    def require_unchanged(self) -> None:
        for name, version in self._versions.items():
            if _version(self._tensors[name]) != version:
                raise CheckpointError(f"Tensor {name!r} of the model in memory was changed while it was read.")

    def as_saved(self) -> LiveCheckpoint | None:
        """Return what `save_pretrained` of transformers writes: legacy names, one tensor for each expert.

        Tensors that it splits or joins are copied in memory.
        """
        library = sys.modules.get("transformers.core_model_loading")
        if library is None or not hasattr(self._module, "save_pretrained"):
            return None
        entries = library.revert_weight_conversion(self._module, dict(self._tensors))
        if entries.keys() == self._tensors.keys():
            return None
        return _checkpoint(f"{self.description}, as save_pretrained writes it", entries, entries, self.config, None)

    def merged(self) -> LiveCheckpoint | None:
        """Return the model as PEFT's `merge_and_unload` makes it, by merging a copy of each adapted layer."""
        if self._module is None or not hasattr(self._module, "peft_config") or self._is_gathered:
            return None
        entries = dict(self._tensors)
        for prefix, layer in self._module.named_modules():
            replaced = _merged_layer(layer)
            if replaced is not None:
                entries = {name: tensor for name, tensor in entries.items() if not name.startswith(f"{prefix}.")}
                entries |= {f"{prefix}.{name}": tensor for name, tensor in replaced.items()}
        return _checkpoint(f"{self.description}, merged", entries, entries, self.config, None)

    def close(self) -> None:
        self._tensors.clear()
        self._versions.clear()


def _merged_layer(layer: Any) -> Mapping[str, torch.Tensor] | None:
    """Return the state dict of what a layer of PEFT becomes when its adapter is merged; None for any other layer."""
    if hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save]
        chosen = layer.modules_to_save[active[0]] if active else layer.original_module
        return dict(chosen.state_dict())
    if not hasattr(layer, "get_base_layer") or not hasattr(layer, "merged") or not hasattr(layer, "merge"):
        return None
    if not layer.merged:
        layer = copy.deepcopy(layer)
        layer.merge()
    return dict(layer.get_base_layer().state_dict())


def _checkpoint(
    description: str,
    entries: Mapping[str, Any],
    gathered: Mapping[str, Any],
    config: Mapping[str, Any],
    module: nn.Module | None,
) -> LiveCheckpoint:
    reasons = {name: _unreadable(value) for name, value in gathered.items()}
    tensors = {name: gathered[name] for name, reason in reasons.items() if reason is None}
    unread = {name: reason for name, reason in reasons.items() if reason is not None}
    versions = {name: _version(tensor) for name, tensor in tensors.items()}
    return LiveCheckpoint(description, config, _ties(entries), unread, tensors, versions, module)


def _unreadable(value: Any) -> str | None:
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.is_meta:
        return "has no data: it is on the meta device"
    if value.layout is not torch.strided or value.is_quantized:
        return "is sparse or quantized"
    if type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        return f"is a {type(value).__name__}, which has no plain elements"
    return None


def _ties(entries: Mapping[str, Any]) -> tuple[frozenset[str], ...]:
    names: dict[object, list[str]] = defaultdict(list)
    for name, value in entries.items():
        if isinstance(value, torch.Tensor):
            names[_identity(value)].append(name)
    return tuple(frozenset(tied) for tied in names.values() if len(tied) > 1)


def _identity(tensor: Any) -> object:
    """Return a key that two names of one tensor share; the object itself where it has no memory of its own."""
    if hasattr(tensor, "to_local"):  # a DTensor
        return _identity(tensor.to_local()), tensor.placements
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) or _is_sharded(tensor) or not tensor.numel():
        return id(tensor)
    if tensor.is_meta or tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside an engine, `DistributedDataParallel` or `torch.compile`."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.parallel.DistributedDataParallel) or hasattr(module, "zero_optimization_stage"):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _config(module: nn.Module) -> Mapping[str, Any]:
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else {}
    return config if isinstance(config, Mapping) else {}
