"""Digests of the slices of a stored tensor along one dim, so that slices that moved can be found again."""

from __future__ import annotations

from math import prod

import torch

from tpcheck.compare.stored import Stored, bit_view

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_PART = 1 << 18  # elements that are multiplied at once: their 8-byte words and keys stay in the cache


def slice_digests(tensor: Stored, dim: int) -> torch.Tensor:
    """Return one 64-bit digest for each index of `dim`, of the bits of everything at that index; shape (size of dim,).

    It depends on the order of the other dims' elements alone, so the digests of the rows of a matrix are those of the
    columns of its transpose. A multilinear sum with pseudo-random odd keys (splitmix64): two slices share it by chance
    with a probability of 2^-63 (Lemire, Kaser: Strongly universal string hashing is fast, arXiv 1202.4961).
    """
    shape = tensor.shape or (1,)
    sums = torch.zeros(shape[dim], dtype=torch.int64)
    others = prod(shape[1:]) // (shape[dim] if dim else 1)  # elements of one row at one index of `dim`
    for rows in tensor.pieces():
        per_row = max(1, _PART // max(1, prod(shape[1:])))
        piece = bit_view(tensor.read(rows)).reshape(len(rows), *shape[1:], -1)
        for start in range(0, len(rows), per_row):
            words = piece[start : start + per_row].to(torch.int64)
            if dim == 0:
                flat = words.reshape(len(words), -1)
                sums[rows.start + start : rows.start + start + len(words)] = (flat * _keys(0, flat.shape[1])).sum(1)
            else:
                moved = words.movedim(dim, 0).reshape(shape[dim], -1)
                first = (rows.start + start) * others * words.shape[-1]
                sums += (moved * _keys(first, moved.shape[1])).sum(1)
    return sums


def _keys(first: int, number: int) -> torch.Tensor:
    """Return odd pseudo-random keys for the places `first`, `first` + 1, ..."""
    mixed = torch.arange(first, first + number) * _GOLDEN
    for shift, factor in _FACTORS:
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed | 1
