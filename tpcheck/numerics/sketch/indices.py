"""The index of a local tensor, as sketches need it: shared by equal tensors, of complex numbers, checked."""

from __future__ import annotations

from functools import lru_cache

import torch

from tpcheck.core.errors import UsageError
from tpcheck.numerics.global_index import PADDING, GlobalIndex


@lru_cache(maxsize=1024)  # shapes of a model's tensors
def whole_index(shape: tuple[int, ...]) -> GlobalIndex:
    """Return the index of a tensor of this shape that is all here."""
    return GlobalIndex.whole(shape)


def shared(index: GlobalIndex) -> GlobalIndex:
    """Return one index for all whole tensors of a shape, so that what is derived from it is kept once."""
    is_whole = index.fragment is None and index.positions is None and all(part is None for part in index.indices)
    return whole_index(index.shape) if is_whole else index


def as_real(index: GlobalIndex) -> GlobalIndex:
    """Return the index of a complex tensor's real view, in which each element of the last dim is two."""
    if "real" not in index.derived:
        shape = (*index.shape[:-1], 2 * index.shape[-1]) if index.shape else (2,)
        doubled = [indices if indices is None else _twice(indices) for indices in index.indices[-1:]] or [None]
        fragment = None if index.fragment is None else (2 * index.fragment[0], 2 * index.fragment[1])
        positions = None if index.positions is None else _twice(index.positions)
        index.derived["real"] = GlobalIndex(shape, (*index.indices[:-1], *doubled), fragment, positions)
    real: GlobalIndex = index.derived["real"]
    return real


def _twice(numbers: torch.Tensor) -> torch.Tensor:
    pairs = torch.stack([2 * numbers, 2 * numbers + 1], dim=-1)
    return pairs.where(numbers[:, None] != PADDING, PADDING).reshape(-1)


def num_padding(index: GlobalIndex) -> int:
    """Return how many local elements are no elements of the whole."""
    if index.positions is None:
        return 0
    if "padding" not in index.derived:
        index.derived["padding"] = int((index.positions == PADDING).sum())
    padding: int = index.derived["padding"]
    return padding


def require_shape(values: torch.Tensor, index: GlobalIndex) -> None:
    """Raise UsageError where the tensor does not have the shape, or the number of elements, of its index."""
    start, stop = index.present
    is_right = values.numel() == stop - start
    if index.fragment is None and index.positions is None:
        is_right = tuple(values.shape) == index.local_shape
    if not is_right:
        raise UsageError(
            "tensor", text_of_shape(values), f"the shape of its index: {index.local_shape}, {stop - start} elements"
        )


def text_of_shape(values: torch.Tensor) -> str:
    """Return the shape as messages show it."""
    return str(tuple(values.shape))
