"""What happened to the values of a tensor that has the right shape."""

from __future__ import annotations

from dataclasses import replace

import torch

from tpcheck.causes.checkpoint.case import Case, Story
from tpcheck.compare.elements import ElementDifference
from tpcheck.compare.stored import Stored, bit_view

_NARROWER = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
_LEAST_ZEROS = 2  # one zero where another number should be may be anything


def not_finite(case: Case) -> Story | None:
    """Every wrong element is NaN or infinite."""
    found = case.difference
    if found is None or found.count_not_finite != found.count:
        return None
    return Story("not_finite", {"count_not_finite": found.count_not_finite})


def all_zero(case: Case) -> Story | None:
    """Every wrong element is zero."""
    found = case.difference
    if found is None or found.count_zero != found.count or found.count < min(_LEAST_ZEROS, found.total):
        return None
    return Story("all_zero", _rows(found))


def bit_flipped(case: Case) -> Story | None:
    """One bit of one element differs."""
    found = case.difference
    if found is None or found.count != 1 or found.count_flipped != 1:
        return None
    actual, expected = (_element(side, found.first) for side in (case.actual, case.expected))
    changed = int((bit_view(actual).reshape(-1) ^ bit_view(expected).reshape(-1)).abs().max())
    width = 8 * bit_view(actual).dtype.itemsize
    return Story("bit_flipped", {"bit": (changed & ((1 << width) - 1)).bit_length() - 1, "index": list(found.first)})


def dtype_rounded(case: Case) -> Story | None:
    """The wrong rows are the reference's, rounded to a narrower dtype on the way."""
    found = case.difference
    if found is None or not case.expected.dtype.is_floating_point:
        return None
    for dtype in _NARROWER:
        if dtype.itemsize < case.expected.dtype.itemsize and _is_rounded(case, found.rows, dtype):
            return Story("dtype_rounded", {"dtype": str(dtype).removeprefix("torch."), **_rows(found)})
    return None


def stale_weight(case: Case) -> Story | None:
    """The wrong rows are those of an earlier checkpoint."""
    found = case.difference
    for name, checkpoint in case.surroundings.earlier.items():
        if found is None or case.expected.name not in checkpoint.names():
            continue
        earlier = replace(case.expected, checkpoint=checkpoint)
        if earlier.shape != case.actual.shape or earlier.dtype != case.actual.dtype:
            continue
        if case.surroundings.comparer.equal_rows(case.actual, earlier, found.rows):
            return Story("stale_weight", {"equals": name, **_rows(found)})
    return None


def duplicate_reduce(case: Case) -> Story | None:
    """Every wrong element is a small multiple of the expected one: copies of a replica were added up."""
    found = case.difference
    if found is None or not case.expected.dtype.is_floating_point or found.count < _LEAST_ZEROS:
        return None
    if not isinstance(found.actual, float) or not isinstance(found.expected, float) or not found.expected:
        return None
    factor = round(found.actual / found.expected) if abs(found.actual / found.expected) < 1e3 else 0
    if factor < 2 or not all(
        torch.equal(case.actual.read(rows), case.expected.read(rows) * factor)
        for rows in case.expected.pieces(found.rows)
    ):
        return None
    return Story("duplicate_reduce", {"factor": factor, **_rows(found)})


def _is_rounded(case: Case, rows: range, dtype: torch.dtype) -> bool:
    for piece in case.expected.pieces(rows):
        expected = case.expected.read(piece)
        rounded = expected.to(dtype).to(expected.dtype)
        if not torch.equal(bit_view(case.actual.read(piece)), bit_view(rounded)):
            return False
    return True


def _rows(found: ElementDifference) -> dict[str, list[int]]:
    return {"rows": [found.rows.start, found.rows.stop]}


def _element(tensor: Stored, index: tuple[int, ...]) -> torch.Tensor:
    if not index:
        return tensor.read(range(1)).reshape(1)
    row = tensor.read(range(index[0], index[0] + 1))
    return row.reshape(row.shape[1:])[index[1:]].reshape(1)
