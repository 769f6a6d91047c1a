"""One trial of a tensor-parallel layer on this rank, beside the plain layer that it replaces."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tpcheck.backends.interface import Backend, HasLayerTable, LayerTable, ParallelLayer, RankLike, ReplacedLayer
from tpcheck.backends.local_part import local_part
from tpcheck.backends.registry import load_backend
from tpcheck.core.errors import BackendError, UsageError
from tpcheck.lab.fuzz.results import INPUT_GRADIENT, MAKING, OUTPUT, Trial
from tpcheck.numerics.differences import frobenius_distance, rounding_error
from tpcheck.numerics.perturb import Perturbation, perturbed_leaves
from tpcheck.numerics.tolerance import NUM_REPLAYS, Tolerance

Tensors = Mapping[str, torch.Tensor]


def laid_out(tensor: torch.Tensor, strides: str) -> torch.Tensor:
    """Return equal values in one of the memory layouts `tpcheck.lab.fuzz.results.STRIDES`.

    Example:
        >>> laid_out(torch.zeros(2, 3), "transposed").stride()
        (1, 2)
    """
    if strides == "expanded" and tensor.numel():  # all elements are equal
        return tensor.reshape(-1)[:1].reshape((1,) * tensor.dim()).expand(tensor.shape)
    if strides == "transposed":  # a vector has no other dim
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else laid_out(tensor, "sliced")
    return tensor.repeat_interleave(2, dim=-1)[..., ::2] if strides == "sliced" else tensor.contiguous()


@dataclass(frozen=True, slots=True)
class LocalParts:
    """The elements of each parameter that one rank holds.

    Attributes:
        plain: The kind of the plain layer.
        shapes: The shapes of the whole parameters.
        positions: Positions of the local elements in the whole parameter, in the local shape.
    """

    plain: ReplacedLayer
    shapes: Mapping[str, tuple[int, ...]]
    positions: Mapping[str, torch.Tensor]

    def of_parameter(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[self.positions[name]]

    def of_output(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[..., self._features(of_output=True)]

    def of_input(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[..., self._features(of_output=False)]

    def _features(self, *, of_output: bool) -> torch.Tensor:
        """Return the outputs (or inputs) that the local elements of the weight belong to, in local order."""
        positions = self.positions["weight"]
        columns = self.shapes["weight"][1]
        by_rows = of_output == (self.plain == "linear")
        numbers = (positions // columns if by_rows else positions % columns).reshape(-1)
        return torch.tensor(list(dict.fromkeys(numbers.tolist())), dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class TriedTensor:
    """One tensor of this rank, and the Frobenius error that rounding may cause."""

    actual: torch.Tensor
    expected: torch.Tensor
    allowed: float


@dataclass(frozen=True, slots=True)
class RankTrial:
    """The results of a trial on one rank.

    Attributes:
        tensors: The output, the gradient of the input, and that of each parameter, by name.
        local_positions: See `LocalParts.positions`.
    """

    tensors: Mapping[str, TriedTensor]
    local_positions: Mapping[str, torch.Tensor]


def try_layer(rank: RankLike, backend: str | Backend, trial: Trial) -> RankTrial:
    """Run a layer forward and backward on this rank. Collective over the TP group.

    Raises:
        UsageError: The backend has no such layer.
        BackendError: The layer raised when it was made, or in its forward or backward pass. This ends the world, since
            other ranks may wait.
    """
    table = layer_table(backend)
    layer = layer_named(table, trial.layer)
    inputs = _inputs(layer, trial)
    with table.session(trial.options):
        with _crashes_of(trial, MAKING):
            parts = _local_parts(layer, trial, rank)
            sharded = _sharded(layer, plain_layer(layer, trial), rank)
        rank_input = parts.of_input(inputs["input"]) if layer.input == "part" else inputs["input"]
        local_input = _leaf(laid_out(rank_input, trial.strides))
        with _crashes_of(trial, "forward"):
            output = sharded(local_input)
        gradient = parts.of_output(inputs["gradient"]) if layer.output == "part" else inputs["gradient"]
        with _crashes_of(trial, "backward"):
            output.backward(laid_out(gradient, trial.gradient_strides))
        actual = _results(sharded, local_input, output)
    plain = plain_layer(layer, trial)
    return RankTrial(
        _tried_tensors(actual, _run(plain, inputs), _replays(plain, inputs), layer, parts), parts.positions
    )


@contextmanager
def _crashes_of(trial: Trial, phase: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BackendError(f"{trial.layer}, {phase}: {type(error).__name__}: {error}") from error


def layer_table(backend: str | Backend) -> LayerTable:
    """Return the layers of a backend.

    Raises:
        UsageError: The backend does not list its layers.
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
        UsageError: There is none, or it cannot be tried.
    """
    layers = {layer.name: layer for layer in table.layers if layer.shard is not None}
    if name not in layers:
        raise UsageError("layer", name, list(layers))
    return layers[name]


def plain_layer(layer: ParallelLayer, trial: Trial) -> nn.Module:
    """Return the plain layer; equal trials give equal bits."""
    torch.manual_seed(0)
    dtype = getattr(torch, trial.dtype)
    inputs, outputs = trial.inputs * layer.in_blocks, trial.outputs * layer.out_blocks
    if layer.plain == "embedding":
        return nn.Embedding(inputs, outputs, dtype=dtype)
    if layer.plain == "linear":
        return nn.Linear(inputs, outputs, trial.bias, dtype=dtype)
    return TransposedLinear(inputs, outputs, trial.bias, dtype)


class TransposedLinear(nn.Module):
    """A linear layer with a weight of inputs x outputs, like `Conv1D` of transformers."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(outputs, dtype=dtype)) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        product = hidden @ self.weight
        return product if self.bias is None else product + self.bias


def _run(module: nn.Module, inputs: Tensors, before: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Return the results of a forward and backward pass of the plain layer, perhaps behind another module."""
    module.zero_grad()
    leaf = _leaf(inputs["input"])
    output = module(leaf if before is None else before(leaf))
    output.backward(inputs["gradient"])
    return _results(module, leaf, output)


def _replays(module: nn.Module, inputs: Tensors) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the results of replays in which the input, the output and their gradients are perturbed by one rounding."""
    perturbation = Perturbation(torch.finfo(inputs["gradient"].dtype).eps, torch.Generator().manual_seed(1))
    with perturbed_leaves(nn.Sequential(first := nn.Identity(), module), perturbation):
        for _ in range(NUM_REPLAYS):
            yield _run(module, inputs, first)


def _inputs(layer: ParallelLayer, trial: Trial) -> dict[str, torch.Tensor]:
    """Return the whole input and the gradient of the whole output."""
    generator = torch.Generator().manual_seed(2)
    dtype = getattr(torch, trial.dtype)
    gradient_shape = (*trial.rows, trial.outputs * layer.out_blocks)
    if layer.plain == "embedding":
        shape = (1,) * len(trial.rows) if trial.strides == "expanded" else trial.rows
        tokens: torch.Tensor = torch.randint(0, trial.inputs, shape, generator=generator)
        inputs = {"input": tokens.expand(trial.rows).contiguous()}
    else:
        inputs = {"input": _drawn((*trial.rows, trial.inputs * layer.in_blocks), dtype, trial.strides, generator)}
    return {**inputs, "gradient": _drawn(gradient_shape, dtype, trial.gradient_strides, generator)}


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, strides: str, generator: torch.Generator) -> torch.Tensor:
    """Draw a tensor; one number for all elements where it will be expanded."""
    drawn = torch.randn((1,) * len(shape) if strides == "expanded" else shape, generator=generator, dtype=torch.float64)
    return drawn.to(dtype).expand(shape).contiguous()


def _local_parts(layer: ParallelLayer, trial: Trial, rank: RankLike) -> LocalParts:
    """Shard a copy with numbered weights, and read which numbers this rank holds."""
    twin = plain_layer(layer, trial).to(torch.float64)
    with torch.no_grad():
        for parameter in twin.parameters():  # each element is its position: exact in float64
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape))
    shapes = {name: tuple(parameter.shape) for name, parameter in twin.named_parameters()}
    sharded = _sharded(layer, twin, rank)
    positions = {name: local_part(parameter.detach()).to(torch.int64) for name, parameter in sharded.named_parameters()}
    return LocalParts(layer.plain, shapes, {name: positions[name].clone() for name in shapes if name in positions})


def _sharded(layer: ParallelLayer, module: nn.Module, rank: RankLike) -> nn.Module:
    assert layer.shard is not None
    return layer.shard(module, rank)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with the same strides as a leaf that gets a gradient if it can."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _results(module: nn.Module, leaf: torch.Tensor, output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output and the gradients; a missing gradient is left out."""
    results = {OUTPUT: local_part(output.detach()).clone()}
    if leaf.grad is not None:
        results[INPUT_GRADIENT] = _gradient(leaf, leaf.grad).clone()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            results[f"gradient of {name}"] = _gradient(parameter, parameter.grad).clone()
    return results


def _gradient(tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a gradient with the placements of its tensor, as an optimizer's step does."""
    return local_part(gradient, getattr(tensor, "placements", None))


def _tried_tensors(
    actual: Tensors, expected: Tensors, replays: Iterator[Tensors], layer: ParallelLayer, parts: LocalParts
) -> dict[str, TriedTensor]:
    """Pair this rank's tensors with its parts of the plain layer's, and with the error that the replays allow."""

    def local(name: str, whole: torch.Tensor) -> torch.Tensor:
        if name == OUTPUT:
            return parts.of_output(whole) if layer.output == "part" else whole
        if name == INPUT_GRADIENT:
            return parts.of_input(whole) if layer.input == "part" else whole
        return parts.of_parameter(name.removeprefix("gradient of "), whole)

    deviations: dict[Hashable, float] = {}
    for replay in replays:
        for name, whole in expected.items():
            distance = frobenius_distance(local(name, replay[name]), local(name, whole))
            deviations[name] = max(distance, deviations.get(name, 0.0))
    tolerance = Tolerance(0.0, NUM_REPLAYS, deviations)
    tried = {}
    for name, whole in expected.items():
        part = local(name, whole)
        smallest = torch.finfo(part.dtype).tiny  # an element that should be 0 may be denormal
        allowed = max(tolerance.allowed(name, rounding_error(part)), smallest)
        tried[name] = TriedTensor(actual.get(name, torch.full_like(part, torch.nan)), part, allowed)
    return tried
