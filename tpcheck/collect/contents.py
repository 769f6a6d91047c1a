"""What the rows of a batch's tensors hold, apart from their order and their padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash

from tpcheck.collect.digest import digest

_MOST_BYTES = 1 << 26  # of one tensor; a cause is looked for once, when batches differ


def contents(tensors: Mapping[str, torch.Tensor], shortest: Mapping[str, int]) -> dict[str, dict[str, str]]:
    """Return digests by path that are equal on ranks whose tensors hold the same samples.

    `rows`: of the rows, in any order. `unpadded`: of the tensor cut to the shortest length on any rank, where the
    rest is one value (right or left). `kept`: of what the attention mask beside it keeps, padding of any kind aside.

    Args:
        tensors: Those that differ between the ranks, and attention masks, by path.
        shortest: Smallest size of the last dim on any rank, by path.
    """
    found: dict[str, dict[str, str]] = {}
    for path, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested or tensor.nbytes > _MOST_BYTES or not tensor.dim():
            continue
        found[path] = {"rows": _rows(tensor)}
        unpadded = _unpadded(tensor, shortest.get(path, tensor.shape[-1]))
        if tensor.dim() > 1 and unpadded is not None:
            found[path]["unpadded"] = digest(unpadded)
        mask = tensors.get(_beside(path))
        if mask is not None and mask.shape == tensor.shape:
            found[path]["kept"] = _kept(tensor, mask)
    return found


def _rows(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest("".join(sorted(digest(row) for row in tensor)).encode())


def _unpadded(tensor: torch.Tensor, length: int) -> torch.Tensor | None:
    rest = tensor.shape[-1] - length
    if rest <= 0:
        return tensor
    for kept, padding in ((tensor[..., :length], tensor[..., length:]), (tensor[..., rest:], tensor[..., :rest])):
        if padding.numel() and bool((padding == padding.reshape(-1)[0]).all()):
            return kept
    return None


def _beside(path: str) -> str:
    parent, dot, _ = path.rpartition(".")
    return f"{parent}{dot}attention_mask"


def _kept(tensor: torch.Tensor, mask: torch.Tensor) -> str:
    rows = [row[keep.bool()] for row, keep in zip(tensor, mask, strict=True)] if tensor.dim() > 1 else []
    return xxhash.xxh3_128_hexdigest("".join(digest(row) for row in rows).encode())
