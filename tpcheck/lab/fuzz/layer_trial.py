"""One trial of a tensor-parallel layer on this rank, beside the plain layer that it replaces."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tpcheck.backends.interface import Backend, Extent, HasLayerTable, LayerTable, ParallelLayer, RankLike
from tpcheck.backends.local_part import local_part
from tpcheck.backends.registry import load_backend
from tpcheck.core.errors import BackendError, UsageError
from tpcheck.lab.fuzz.results import INPUT_GRADIENT, MAKING, OUTPUT, Trial
from tpcheck.numerics.differences import frobenius_distance, rounding_error
from tpcheck.numerics.perturb import Perturbation, perturbed_leaves
from tpcheck.numerics.precision import everything_in_float64
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
    """The elements of each parameter, and of input and output, that one rank holds.

    Attributes:
        layer: The kind of layer.
        shapes: The shapes of the whole parameters.
        positions: Positions of the local elements in the whole parameter, in the local shape.
        tp_rank, tp: The rank in its TP group, and the size of the group.
    """

    layer: ParallelLayer
    shapes: Mapping[str, tuple[int, ...]]
    positions: Mapping[str, torch.Tensor]
    tp_rank: int
    tp: int

    def of_parameter(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[self.positions[name]]

    def of_output(self, whole: torch.Tensor) -> torch.Tensor:
        return self._local(whole, self.layer.output, of_output=True)

    def of_input(self, whole: torch.Tensor) -> torch.Tensor:
        return self._local(whole, self.layer.input, of_output=False)

    def _local(self, whole: torch.Tensor, extent: Extent, *, of_output: bool) -> torch.Tensor:
        if extent == "rows":
            return whole.chunk(self.tp, dim=self.layer.rows_dim)[self.tp_rank]
        return whole[..., self._features(of_output=of_output)] if extent == "part" else whole

    def _features(self, *, of_output: bool) -> torch.Tensor:
        """Return the outputs (or inputs) that the local elements of the weight belong to, in local order."""
        positions = self.positions[self.layer.part_of]
        columns = self.shapes[self.layer.part_of][1]
        by_rows = of_output == (self.layer.plain not in ("embedding", "transposed_linear"))
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
        replicates: See `ParallelLayer.replicates`.
    """

    tensors: Mapping[str, TriedTensor]
    local_positions: Mapping[str, torch.Tensor]
    replicates: tuple[str, ...] = ()


def try_layer(rank: RankLike, backend: str | Backend, trial: Trial) -> RankTrial:
    """Run a layer forward and backward on this rank. Collective over the TP group.

    Raises:
        UsageError: The backend has no such layer.
        BackendError: The layer raised when it was made, or in its forward or backward pass. This ends the world, since
            other ranks may wait.
    """
    table = layer_table(backend)
    layer = layer_named(table, trial.layer)
    plain = plain_layer(layer, trial)
    with everything_in_float64(trial.dtype == "float64"):
        inputs = _inputs(layer, trial, plain)
        with table.session(trial.options), torch.set_grad_enabled(layer.trains):
            with _crashes_of(trial, MAKING):
                parts = _local_parts(layer, trial, rank)
                sharded = _sharded(layer, plain_layer(layer, trial), rank)
            local_input = _leaf(laid_out(parts.of_input(inputs["input"]), trial.strides))
            with _crashes_of(trial, "forward"):
                output = sharded(local_input)
            if layer.trains:
                with _crashes_of(trial, "backward"):
                    output.backward(laid_out(parts.of_output(inputs["gradient"]), trial.gradient_strides))
                    if layer.reduce_gradients is not None:
                        layer.reduce_gradients(sharded, rank)
            actual = _results(sharded, local_input, output)
        expected = _run(plain, inputs)
        if not layer.trains:
            expected = {OUTPUT: expected[OUTPUT]}
        tensors = _tried_tensors(actual, expected, _replays(plain, inputs), parts)
        return RankTrial(tensors, parts.positions, layer.replicates)


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
            "backend",
            loaded.name,
            "a backend whose layers can be tried one by one: deepspeed, dtensor, megatron, transformers",
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
    if layer.plain == "transposed_linear":
        return TransposedLinear(inputs, outputs, trial.bias, dtype)
    module = layer.plain(trial).to(dtype)
    torch.manual_seed(0)  # how many numbers its own initialisation draws depends on the default dtype
    with torch.no_grad():
        for parameter in module.parameters():  # ones of a norm would hide what multiplies by them
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return module


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


def _inputs(layer: ParallelLayer, trial: Trial, plain: nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole input and the gradient of the whole output.

    Raises:
        UsageError: The layer takes another number of dims.
    """
    generator = torch.Generator().manual_seed(2)
    dtype = getattr(torch, trial.dtype)
    rows = _rows(layer, trial)
    if layer.plain == "embedding":
        shape = (1,) * len(rows) if trial.strides == "expanded" else rows
        tokens: torch.Tensor = torch.randint(0, trial.inputs, shape, generator=generator)
        whole = tokens.expand(rows).contiguous()
    else:
        whole = _drawn((*rows, trial.inputs * layer.in_blocks), dtype, trial.strides, generator)
    with torch.no_grad():
        output = plain(whole)
    return {"input": whole, "gradient": _drawn(output.shape, output.dtype, trial.gradient_strides, generator)}


def _rows(layer: ParallelLayer, trial: Trial) -> tuple[int, ...]:
    """Return the dims before the last one, the one that ranks divide a multiple of their number."""
    if layer.num_rows not in (None, len(trial.rows)):
        raise UsageError("trial.rows", trial.rows, f"{layer.num_rows} dims, which {layer.name} takes")
    if "rows" not in (layer.input, layer.output):
        return trial.rows
    return tuple(size * trial.tp if dim == layer.rows_dim else size for dim, size in enumerate(trial.rows))


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
    held = {name: positions[name].clone() for name in shapes if name in positions}
    return LocalParts(layer, shapes, held, rank.rank % trial.tp, trial.tp)


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
    actual: Tensors, expected: Tensors, replays: Iterator[Tensors], parts: LocalParts
) -> dict[str, TriedTensor]:
    """Pair this rank's tensors with its parts of the plain layer's, and with the error that the replays allow."""

    def local(name: str, whole: torch.Tensor) -> torch.Tensor:
        if name == OUTPUT:
            return parts.of_output(whole)
        if name == INPUT_GRADIENT:
            return parts.of_input(whole)
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
