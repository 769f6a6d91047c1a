"""Clips by the norm of gradients that are DTensors on several meshes, and plain tensors beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm


def clip_by_mesh(parameters: Sequence[torch.Tensor], max_norm: float) -> float:
    """Clip as torch does where all gradients share a mesh, else as transformers' Trainer and accelerate do.

    torch.nn.utils.clip_grad_norm_ refuses a mixture of meshes. The two others make one norm for each mesh with torch's
    own `get_total_norm`, and the norm of those; plain gradients count once.

    Returns:
        The norm before clipping.
    """
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    limit = max_norm if max_norm > 0 else float("inf")
    if len(by_mesh) == 1:
        return float(_whole(clip_grad_norm_(parameters, limit)))
    norms = [_whole(get_total_norm([one.grad for one in group if one.grad is not None])) for group in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        clip_grads_with_norm_(group, limit, total)
    return float(total)


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
