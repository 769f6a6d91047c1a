"""Names of rows by the content of their samples, and digests of samples that slices add up to."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from tpcheck.core.digests import odd_keys, splitmix
from tpcheck.numerics.sketch.signs import POSITIONS, TILES

_CHUNK_WORDS = 1 << 16  # of each sample, multiplied at once


@dataclass(frozen=True, slots=True, eq=False)
class RowKeys:
    """Names of rows by content, so that a sum over rows is the same wherever and in whatever order they are.

    Keep them for all tensors with these rows: what is derived from them is kept with them.

    Attributes:
        keys: One int64 for each row.
        tiles: The tile of each row, int64 from 0 to TILES - 1.
    """

    keys: torch.Tensor
    tiles: torch.Tensor
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)


def row_keys(samples: torch.Tensor, length: int, positions: torch.Tensor | None = None) -> RowKeys:
    """Return the keys of the rows of a [B, length, ...] tensor, for B samples with these keys, on their device.

    For a [length, B, ...] tensor transpose `keys` and `tiles`, seen as [B, length].

    Args:
        positions: Those of `length` that are here, int64 [n] or [B, n]; None for all.
    """
    if positions is None:
        positions = torch.arange(length, dtype=torch.int64, device=samples.device)
    keys = splitmix(samples[:, None] ^ splitmix(positions + POSITIONS))
    tiles = (positions * TILES // max(length, 1)).expand_as(keys)
    return RowKeys(keys.reshape(-1), tiles.reshape(-1))


def sample_keys(leaf: torch.Tensor) -> torch.Tensor:
    """Return a digest of each sample's content, int64 [B], of a [B, ...] tensor; the same on every device.

    Integers of any width have equal digests. Two multilinear sums of 64 bits with odd keys: one changed element always
    changes them, and two samples share both with a probability of 2^-62 (as in `core.digests`).
    """
    with torch.no_grad():
        words = _as_words(leaf.detach())
        batch, length = words.shape
        sums = torch.zeros(2, batch, dtype=torch.int64, device=leaf.device)
        for stream in (0, 1):
            for start in range(0, length, _CHUNK_WORDS):
                chunk = words[:, start : start + _CHUNK_WORDS].to(torch.int64)
                sums[stream] += (chunk * odd_keys((stream << 40) + start, chunk.shape[1], leaf.device)).sum(1)
        return keys_of_sums(sums, length)


def slice_sums(leaf: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return what a slice adds to the sums of each whole sample, int64 [2, B], and the words of one position.

    Sums over slices that make up whole samples are what `keys_of_sums` turns into the digests of `sample_keys`.

    Args:
        leaf: [B, n, ...], n positions of each sample.
        positions: Which these are, int64 [n] or [B, n].
    """
    with torch.no_grad():
        words = _as_words(leaf.detach())
        batch, number = leaf.shape[:2]
        width = words.shape[1] // max(number, 1)
        words = words.to(torch.int64).reshape(batch, number, width)
        index = positions[..., None] * width + torch.arange(width, device=leaf.device)
        sums = [(words * (splitmix(index + (stream << 40)) | 1)).sum((1, 2)) for stream in (0, 1)]
        return torch.stack(sums), width


def keys_of_sums(sums: torch.Tensor, num_words: int) -> torch.Tensor:
    """Return the digests of samples of so many words with these multilinear sums, [2, B]."""
    digests = torch.full_like(sums[0], num_words)
    for of_stream in sums:
        digests = splitmix(digests ^ of_stream)
    return digests


def _as_words(leaf: torch.Tensor) -> torch.Tensor:
    """Return a tensor as [B, words] of integers; floating-point numbers as their bits."""
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf.resolve_conj())
    flat = leaf.reshape(leaf.shape[0], prod(leaf.shape[1:]))
    if not flat.is_floating_point():
        return flat
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.contiguous().view(integers[flat.element_size()])
