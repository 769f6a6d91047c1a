"""Finds the loss in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tpcheck.errors import UsageError


def loss_of(output: Any) -> torch.Tensor:
    """Return the loss that a model returns.

    Raises:
        UsageError: There is none.
    """
    if (loss := found_loss(output)) is not None:
        return loss
    raise UsageError(
        "build", type(output).__name__, "a model that returns its loss (a scalar, `.loss`, or the first of a tuple)"
    )


def found_loss(output: Any) -> torch.Tensor | None:
    """Return the loss: `output.loss`, `output["loss"]`, a scalar output, or the first scalar of a tuple; or None."""
    candidates = [getattr(output, "loss", None)]
    if isinstance(output, Mapping):
        candidates.append(output.get("loss"))
    candidates.extend(output if isinstance(output, (tuple, list)) else [output])
    for value in candidates:
        if isinstance(value, torch.Tensor) and value.numel() == 1 and value.requires_grad:
            return value.reshape(())
    return None
