"""What this process does with CUDA, asked without starting it."""

from __future__ import annotations

import torch


def uses_cuda() -> bool:
    """Return whether this process has started to use CUDA."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured: what is called then does not run, and nothing may wait for it."""
    return uses_cuda() and torch.cuda.is_current_stream_capturing()
