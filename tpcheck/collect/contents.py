"""What the rows of a batch's tensors hold, apart from their order and their padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import xxhash

from tpcheck.collect.digest import digest

_MOST_BYTES = 1 << 26  # of one tensor; a cause is looked for once, when batches differ


def contents(tensors: Mapping[str, torch.Tensor], shortest: Mapping[str, Sequence[int]]) -> dict[str, dict[str, str]]:
    """Return digests by path that are equal on ranks whose tensors hold the same samples.

    `rows`: of the rows, in any order. `unpadded`: of the tensor cut to the shortest size on any rank in every dim but
    the first, where the rest is one value (at the end or at the start). `kept`: of what the attention mask beside it
    keeps, padding of any kind aside.

    Args:
        tensors: Those that differ between the ranks, and attention masks, by path.
        shortest: Smallest size of each dim on any rank, by path; the tensor's own where it is absent.
    """
    found: dict[str, dict[str, str]] = {}
    for path, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested or tensor.nbytes > _MOST_BYTES or not tensor.dim():
            continue
        found[path] = {"rows": _rows(tensor)}
        unpadded = _unpadded(tensor, shortest.get(path, tensor.shape))
        if tensor.dim() > 1 and unpadded is not None:
            found[path]["unpadded"] = digest(unpadded)
        mask = tensors.get(_beside(path))
        if mask is not None and 1 < mask.dim() <= tensor.dim() and mask.shape == tensor.shape[: mask.dim()]:
            found[path]["kept"] = _kept(tensor, mask)
    return found


def _rows(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest("".join(sorted(digest(row) for row in tensor)).encode())


def _unpadded(tensor: torch.Tensor, shortest: Sequence[int]) -> torch.Tensor | None:
    """Return the tensor without its padding, None where what is too much is more than that."""
    if len(shortest) != tensor.dim():
        return None
    for dim in range(1, tensor.dim()):
        kept = _cut(tensor, dim, shortest[dim])
        if kept is None:
            return None
        tensor = kept
    return tensor


def _cut(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor | None:
    rest = tensor.shape[dim] - length
    if rest <= 0:
        return tensor
    for start, padding in ((0, tensor.narrow(dim, length, rest)), (rest, tensor.narrow(dim, 0, rest))):
        if padding.numel() and bool((padding == padding.reshape(-1)[0]).all()):
            return tensor.narrow(dim, start, length)
    return None


def _beside(path: str) -> str:
    parent, dot, _ = path.rpartition(".")
    return f"{parent}{dot}attention_mask"


def _kept(tensor: torch.Tensor, mask: torch.Tensor) -> str:
    rows = [row[keep.bool()] for row, keep in zip(tensor, mask, strict=True)]
    return xxhash.xxh3_128_hexdigest("".join(digest(row) for row in rows).encode())
