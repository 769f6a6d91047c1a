"""Equal numbers that lie otherwise in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


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
