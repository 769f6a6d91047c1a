"""Builds the model under a seed, with weights under which bugs show, and finds the loss in its output."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tpcheck.core.digests import digest
from tpcheck.core.errors import UsageError
from tpcheck.model.options import Request


def build_model(request: Request, device: torch.device) -> nn.Module:
    """Return a new model in the request's dtype; equal requests give bitwise equal models.

    Raises:
        UsageError: `build` does not return a module.
    """
    seed = request.options.seed
    torch.manual_seed(seed)
    model = request.build()
    if not isinstance(model, nn.Module):
        raise UsageError("build", type(model).__name__, "a callable that returns a torch.nn.Module")
    model = model.to(device=device, dtype=getattr(torch, request.options.dtype)).train()
    _disable_dropout(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
            if request.spread_weights and parameter.dim() > 1:
                _spread(parameter)
            _draw_constants(parameter, generator)
    return model


def require_equal_models(model: nn.Module, first: nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    """Check the second of two builds against the first one and its initial state.

    Raises:
        UsageError: They share parameters, or differ although they were built under the same seed.
    """
    if {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in first.parameters()}:
        raise UsageError("build", "the same model twice", "a callable that makes a new model at each call")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in expected or digest(tensor) != digest(expected[name]):
            raise UsageError("build", name, "a model with the same weights each time it is called under one seed")


def loss_of(output: Any) -> torch.Tensor:
    """Return the loss that a model returns.

    Raises:
        UsageError: There is none.
    """
    if (loss := find_loss(output)) is not None:
        return loss
    raise UsageError(
        "build", type(output).__name__, "a model that returns its loss (a scalar, `.loss`, or the first of a tuple)"
    )


def find_loss(output: Any) -> torch.Tensor | None:
    """Return the loss: `output.loss`, `output["loss"]`, a scalar output, or the first scalar of a tuple; or None."""
    candidates = [getattr(output, "loss", None)]
    if isinstance(output, Mapping):
        candidates.append(output.get("loss"))
    candidates.extend(output if isinstance(output, (tuple, list)) else [output])
    for value in candidates:
        if isinstance(value, torch.Tensor) and value.numel() == 1 and value.requires_grad:
            return value.reshape(())
    return None


def _spread(matrix: torch.Tensor) -> None:
    """Scale a matrix so that outputs are as large as inputs; the usual 0.02 leaves logits and attention flat."""
    std = matrix.std()
    if std > 0:
        matrix.mul_(matrix.shape[-1] ** -0.5 / std)


def _draw_constants(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Draw rows that are all one value (zero biases, unit norms, padding rows) away from 0 and 1.

    Such defaults hide bugs: a bias of zero can be added any number of times, and all norm weights of one are equal.
    """
    rows = parameter.reshape(1, -1) if parameter.dim() < 2 else parameter.flatten(1)
    constant = (rows == rows[:, :1]).all(dim=1, keepdim=True)
    if not constant.any():
        return
    size = 0.1 + 0.4 * torch.rand(rows.shape, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1
    drawn = rows + (size * sign).to(device=rows.device, dtype=rows.dtype)
    parameter.copy_(torch.where(constant, drawn, rows).reshape(parameter.shape))


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: random masks of sharded activations cannot equal the reference's."""
    for module in model.modules():
        for name, value in vars(module).items():
            is_probability = isinstance(value, float) and 0 < value <= 1
            is_dropout = "drop" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
            if is_probability and is_dropout:
                setattr(module, name, 0.0)
