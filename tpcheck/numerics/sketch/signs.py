"""Random signs of rows, columns and elements, hashed from where they are in the whole tensor."""

from __future__ import annotations

from math import prod

import torch

from tpcheck.core.digests import splitmix

SIGN_SETS = 4
TILES = 16  # along the rows and along the columns
# Streams of the hash, far apart: a row and a column of the same number have unrelated signs.
ROWS, COLUMNS, _ELEMENTS, POSITIONS = 1 << 60, 2 << 60, 3 << 60, 1 << 59


def signs_of(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return SIGN_SETS signs for each key, 1 or -1: (SIGN_SETS, n)."""
    hashed = splitmix(keys)
    bits = torch.stack([(hashed >> (63 - sign_set)) & 1 for sign_set in range(SIGN_SETS)])
    return (1 - 2 * bits).to(dtype)


def signs_of_elements(positions: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the signs (SIGN_SETS, n) of the elements at these flat positions, and their tiles below TILES^2."""
    if len(shape) < 2:
        return signs_of(positions + _ELEMENTS, torch.float64), positions * TILES**2 // max(prod(shape), 1)
    num_rows, num_columns = prod(shape[:-1]), shape[-1]
    rows, columns = positions // num_columns, positions % num_columns
    signs = signs_of(rows + ROWS, torch.float64) * signs_of(columns + COLUMNS, torch.float64)
    return signs, rows * TILES // num_rows * TILES + columns * TILES // num_columns
