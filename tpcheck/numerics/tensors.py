"""The tensors inside a module's arguments or outputs, and those of a model: listed, mapped, copied, put back."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from tpcheck.backends.local_part import local_part


def named_tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (path, tensor) for every tensor in nested mappings, sequences and dataclasses; other objects hold none."""
    if isinstance(value, torch.Tensor):
        yield path or "0", value
    else:
        for name, child in _children(value):
            yield from named_tensors(child, f"{path}.{name}" if path else name)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(name), child) for name, child in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), child) for index, child in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return `value` with `function` applied to its tensors, nested in tuples, lists, dicts and model outputs.

    Anything else is returned as it is, and so is a container in which nothing changed.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, child) for child in value)
    if isinstance(value, dict):  # a transformers ModelOutput is one, whose attributes follow its items
        mapped = {name: map_tensors(function, child) for name, child in value.items()}
        changed = {name: child for name, child in mapped.items() if child is not value[name]}
        result = copy(value) if changed else value
        for name, child in changed.items():
            result[name] = child
        return result
    return value


def pickled(value: Any) -> bytes:
    """Return the pickle of a value that holds many small tensors, each as its bytes; `pickle.loads` loads it.

    What was on a GPU comes to the current GPU of the process that loads it.

    torch writes a file for each tensor, which takes ten times as long. Tensors that share memory no longer do.
    """
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: _reduced}
    pickler.dump(value)
    return buffer.getvalue()


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


def _reduced(tensor: torch.Tensor) -> Any:
    is_plain = tensor.device.type in ("cpu", "cuda") and tensor.layout is torch.strided and not tensor.requires_grad
    if not is_plain or tensor.dtype not in _DTYPES or not tensor.numel():
        return tensor.__reduce_ex__(2)  # type: ignore[no-untyped-call]
    flat = tensor.resolve_neg().contiguous().reshape(-1)
    content = flat.view(torch.uint8).cpu().numpy().tobytes()
    return _unreduced, (content, tensor.dtype, tuple(tensor.shape), tensor.device.type)


def _unreduced(content: bytes, dtype: torch.dtype, shape: tuple[int, ...], device_type: str) -> torch.Tensor:
    """Return the tensor, on the device of this process rather than on the one where it was: ranks have GPUs each."""
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape).to(device_type)


State = Mapping[str, torch.Tensor]


def copy_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the parameters; of this rank's part where one is a DTensor."""
    return {name: local_part(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def copy_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the buffers, also of those that a checkpoint leaves out."""
    return {name: local_part(buffer.detach()).clone() for name, buffer in model.named_buffers()}


def restore_parameters(model: nn.Module, saved: State) -> None:
    """Set the parameters of an unsharded model back."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])


def restore_buffers(model: nn.Module, saved: State) -> None:
    """Set the buffers back, also those that the model has replaced by others since."""
    for name, buffer in saved.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer.clone()


@contextmanager
def state_restored(model: nn.Module) -> Iterator[None]:
    """Run without gradients; restore buffers, also those that are replaced meanwhile, and random generators."""
    before = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng():
        yield
        for name, (buffer, value) in before.items():
            buffer.copy_(value)
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._buffers[attribute] = buffer
