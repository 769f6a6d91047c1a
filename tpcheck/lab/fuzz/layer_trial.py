"""Tries one tensor-parallel layer on this rank, beside the plain layer that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tpcheck.backends.interface import Backend, HasLayerTable, LayerTable, ParallelLayer, RankLike, ReplacedLayer
from tpcheck.backends.local_part import local_part
from tpcheck.backends.registry import load_backend
from tpcheck.core.errors import BackendError, UsageError
from tpcheck.lab.fuzz.results import MAKING, Trial
from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.tolerance import NUM_REPLAYS


def laid_out(tensor: torch.Tensor, strides: str) -> torch.Tensor:
    """Return equal numbers that lie in memory as one of `records.trial.STRIDES` says.

    Example:
        >>> laid_out(torch.zeros(2, 3), "transposed").stride()
        (1, 2)
    """
    return _LAID_OUT[strides](tensor)


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else _sliced(tensor)


def _sliced(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def _expanded(tensor: torch.Tensor) -> torch.Tensor:
    """Return the first number, everywhere: the tensor holds no other."""
    return tensor.reshape(-1)[:1].reshape((1,) * tensor.dim()).expand(tensor.shape) if tensor.numel() else tensor


_LAID_OUT: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": _expanded,
}


def numbered(module: nn.Module) -> nn.Module:
    """Write into every parameter the positions of its elements; exact in float64."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape))
    return module


@dataclass(frozen=True, slots=True)
class Parts:
    """What one rank holds.

    Attributes:
        plain: What kind of layer it was.
        shapes: The whole parameters' shapes.
        held: Positions of the elements that the rank holds, in the shape in which it holds them.
    """

    plain: ReplacedLayer
    shapes: Mapping[str, tuple[int, ...]]
    held: Mapping[str, torch.Tensor]

    def of_parameter(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[self.held[name]]

    def of_output(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[..., self._features(of_output=True)]

    def of_input(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[..., self._features(of_output=False)]

    def _features(self, *, of_output: bool) -> torch.Tensor:
        """Return which outputs (or inputs) the weight's elements belong to, in the order in which they are held."""
        held = self.held["weight"]
        columns = self.shapes["weight"][1]
        by_rows = of_output == (self.plain == "linear")
        numbers = (held // columns if by_rows else held % columns).reshape(-1)
        return torch.tensor(list(dict.fromkeys(numbers.tolist())), dtype=torch.int64)


Tensors = Mapping[str, torch.Tensor]
OUTPUT, INPUT_GRADIENT = "output", "gradient of the input"


@dataclass(frozen=True, slots=True)
class TriedTensor:
    """One tensor of this rank.

    Attributes:
        deviation: How far the expected tensor moved under perturbed inputs (Frobenius).
    """

    actual: torch.Tensor
    expected: torch.Tensor
    deviation: float


@dataclass(frozen=True, slots=True)
class RankTrial:
    """What one rank has to tell of a trial.

    Attributes:
        tensors: By name: the output, the gradient of the input, and that of each parameter.
        held: Which elements of each parameter this rank holds, as positions in the plain layer's.
    """

    tensors: Mapping[str, TriedTensor]
    held: Mapping[str, torch.Tensor]


def try_layer(rank: RankLike, backend: str | Backend, trial: Trial) -> RankTrial:
    """Run a layer forward and backward on this rank. Collective over the TP group.

    Raises:
        UsageError: The backend has no such layer.
        BackendError: The layer raised: while it was made, in its forward pass, or in its backward pass. It ends the
            world, since other ranks may wait.
    """
    table = layer_table(backend)
    layer = layer_named(table, trial.layer)
    given = _given(layer, trial)
    with table.session(trial.options):
        with _blamed_on(trial, MAKING):
            parts = _parts(layer, trial, rank)
            sharded = _sharded(layer, plain_layer(layer, trial), rank)
        whole_or_part = parts.of_input(given["input"]) if layer.input == "part" else given["input"]
        own_input = _leaf(laid_out(whole_or_part, trial.strides))
        with _blamed_on(trial, "forward"):
            output = sharded(own_input)
        gradient = parts.of_output(given["gradient"]) if layer.output == "part" else given["gradient"]
        with _blamed_on(trial, "backward"):
            output.backward(laid_out(gradient, trial.gradient_strides))
        actual = _results(sharded, own_input, output)
    return RankTrial(_compared(actual, plain_results(plain_layer(layer, trial), given), layer, parts), parts.held)


@contextmanager
def _blamed_on(trial: Trial, phase: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BackendError(f"{trial.layer}, {phase}: {type(error).__name__}: {error}") from error


def layer_table(backend: str | Backend) -> LayerTable:
    """Return the layers of a backend.

    Raises:
        UsageError: It tells of none.
    """
    loaded = load_backend(backend)
    if not isinstance(loaded, HasLayerTable):
        raise UsageError(
            "backend", loaded.name, "a backend whose layers can be tried one by one: deepspeed, transformers"
        )
    return loaded.layer_table()


def layer_named(table: LayerTable, name: str) -> ParallelLayer:
    """Return the layer of that name.

    Raises:
        UsageError: There is none, or it is not tried.
    """
    found = {layer.name: layer for layer in table.layers if layer.shard is not None}
    if name not in found:
        raise UsageError("layer", name, list(found))
    return found[name]


def plain_layer(layer: ParallelLayer, trial: Trial) -> nn.Module:
    """Return the layer that is replaced; equal trials give equal bits."""
    torch.manual_seed(0)
    dtype = getattr(torch, trial.dtype)
    inputs, outputs = trial.inputs * layer.in_blocks, trial.outputs * layer.out_blocks
    if layer.plain == "embedding":
        return nn.Embedding(inputs, outputs, dtype=dtype)
    if layer.plain == "linear":
        return nn.Linear(inputs, outputs, trial.bias, dtype=dtype)
    return TransposedLinear(inputs, outputs, trial.bias, dtype)


class TransposedLinear(nn.Module):
    """A linear layer whose weight is inputs x outputs, as `Conv1D` of transformers."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(outputs, dtype=dtype)) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        product = hidden @ self.weight
        return product if self.bias is None else product + self.bias


def plain_results(module: nn.Module, given: Tensors) -> dict[str, torch.Tensor]:
    """Return the whole of every tensor that is compared, and of the same in each perturbed replay."""
    expected = _plain_once(module, given)
    generator = torch.Generator().manual_seed(1)
    return expected | {
        f"replay {replay} of {name}": tensor
        for replay in range(NUM_REPLAYS)
        for name, tensor in _perturbed_once(module, given, generator).items()
    }


def _plain_once(module: nn.Module, given: Tensors) -> dict[str, torch.Tensor]:
    module.zero_grad()
    whole = _leaf(given["input"])
    output = module(whole)
    output.backward(given["gradient"])
    return _results(module, whole, output)


def _perturbed_once(module: nn.Module, given: Tensors, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Run with everything that goes in moved by one rounding error: what cancels in a sum moves by as much."""
    kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(_nudged(parameter, generator))
    results = _plain_once(module, {name: _nudged(tensor, generator) for name, tensor in given.items()})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(kept[name])
    return results


def _nudged(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    uniform = torch.rand(tensor.shape, dtype=torch.float64, generator=generator)
    return (tensor.detach().to(torch.float64) * (1 + torch.finfo(tensor.dtype).eps * (2 * uniform - 1))).to(
        tensor.dtype
    )


def _given(layer: ParallelLayer, trial: Trial) -> dict[str, torch.Tensor]:
    """Return the whole input and the gradient of the whole output."""
    generator = torch.Generator().manual_seed(2)
    dtype = getattr(torch, trial.dtype)
    gradient_shape = (*trial.rows, trial.outputs * layer.out_blocks)
    if layer.plain == "embedding":
        shape = (1,) * len(trial.rows) if trial.strides == "expanded" else trial.rows
        tokens: torch.Tensor = torch.randint(0, trial.inputs, shape, generator=generator)
        given = {"input": tokens.expand(trial.rows).contiguous()}
    else:
        given = {"input": _drawn((*trial.rows, trial.inputs * layer.in_blocks), dtype, trial.strides, generator)}
    return {**given, "gradient": _drawn(gradient_shape, dtype, trial.gradient_strides, generator)}


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, strides: str, generator: torch.Generator) -> torch.Tensor:
    """Draw numbers; one for all where they are expanded."""
    drawn = torch.randn((1,) * len(shape) if strides == "expanded" else shape, generator=generator, dtype=torch.float64)
    return drawn.to(dtype).expand(shape).contiguous()


def _parts(layer: ParallelLayer, trial: Trial, rank: RankLike) -> Parts:
    """Ask a twin whose weights are numbered which of them this rank holds."""
    twin = numbered(plain_layer(layer, trial).to(torch.float64))
    shapes = {name: tuple(parameter.shape) for name, parameter in twin.named_parameters()}
    sharded = _sharded(layer, twin, rank)
    held = {name: local_part(parameter.detach()).to(torch.int64) for name, parameter in sharded.named_parameters()}
    return Parts(layer.plain, shapes, {name: held[name].clone() for name in shapes if name in held})


def _sharded(layer: ParallelLayer, module: nn.Module, rank: RankLike) -> nn.Module:
    assert layer.shard is not None
    return layer.shard(module, rank)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same tensor, lying as it lies, as one that gets a gradient if it can."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _results(module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what came of a forward and backward pass; a gradient that is missing is left out."""
    results = {OUTPUT: local_part(output.detach()).clone()}
    if given.grad is not None:
        results[INPUT_GRADIENT] = _gradient(given, given.grad).clone()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            results[f"gradient of {name}"] = _gradient(parameter, parameter.grad).clone()
    return results


def _gradient(tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a gradient with the placements of its tensor, as an optimizer's step does."""
    return local_part(gradient, getattr(tensor, "placements", None))


def _compared(actual: Tensors, results: Tensors, layer: ParallelLayer, parts: Parts) -> dict[str, TriedTensor]:
    """Cut from the plain layer's results what this rank should have."""

    def own(name: str, whole: torch.Tensor) -> torch.Tensor:
        if name == OUTPUT:
            return parts.of_output(whole) if layer.output == "part" else whole
        if name == INPUT_GRADIENT:
            return parts.of_input(whole) if layer.input == "part" else whole
        return parts.of_parameter(name.removeprefix("gradient of "), whole)

    compared = {}
    for name in (one for one in results if not one.startswith("replay ")):
        expected = own(name, results[name])
        moved = [
            frobenius_distance(own(name, results[f"replay {replay} of {name}"]), expected)
            for replay in range(NUM_REPLAYS)
        ]
        missing = torch.full_like(expected, torch.nan)
        compared[name] = TriedTensor(actual.get(name, missing), expected, max(moved))
    return compared
