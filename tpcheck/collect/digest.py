"""Digests of the bits of tensors."""

from __future__ import annotations

import torch
import xxhash


def digest(tensor: torch.Tensor) -> str:
    """Return a digest of dtype, shape and bits; NaN equals NaN bit for bit, 0.0 does not equal -0.0."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    state = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()
