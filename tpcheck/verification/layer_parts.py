"""Which part of a plain layer one rank holds, learned from a twin whose weights are numbered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tpcheck.adapters.offers import Plain


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

    plain: Plain
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
