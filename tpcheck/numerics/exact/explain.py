"""Names what happened to a tensor that differs from what it should be, only where that is seen in its bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tpcheck.core.causes import Cause, Explanation, first_explanation
from tpcheck.families.special_cases import FUSED_PARAMETER
from tpcheck.numerics.exact.elements import ElementDifference, element_difference, slice_digests
from tpcheck.numerics.exact.layouts import Case, Slices, Surroundings, layout_story, runs_of
from tpcheck.numerics.exact.stored import BitComparer, Stored, bit_view

_NARROWER = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
_LEAST_ZEROS = 2  # one zero where another number should be may be anything


def not_finite(case: Case) -> Explanation | None:
    """Every wrong element is NaN or infinite."""
    found = case.difference
    if found is None or found.count_not_finite != found.count:
        return None
    return Explanation(Cause.NOT_FINITE, evidence={"count_not_finite": found.count_not_finite})


def all_zero(case: Case) -> Explanation | None:
    """Every wrong element is zero."""
    found = case.difference
    if found is None or found.count_zero != found.count or found.count < min(_LEAST_ZEROS, found.total):
        return None
    return Explanation(Cause.ALL_ZERO, evidence=_rows(found))


def bit_flipped(case: Case) -> Explanation | None:
    """One bit of one element differs."""
    found = case.difference
    if found is None or found.count != 1 or found.count_flipped != 1:
        return None
    actual, expected = (_element(side, found.first) for side in (case.actual, case.expected))
    changed = int((bit_view(actual).reshape(-1) ^ bit_view(expected).reshape(-1)).abs().max())
    width = 8 * bit_view(actual).dtype.itemsize
    return Explanation(
        Cause.BIT_FLIPPED, evidence={"bit": (changed & ((1 << width) - 1)).bit_length() - 1, "index": list(found.first)}
    )


def dtype_rounded(case: Case) -> Explanation | None:
    """The wrong rows are the reference's, rounded to a narrower dtype on the way."""
    found = case.difference
    if found is None or not case.expected.dtype.is_floating_point:
        return None
    for dtype in _NARROWER:
        if dtype.itemsize < case.expected.dtype.itemsize and _is_rounded(case, found.rows, dtype):
            return Explanation(
                Cause.DTYPE_ROUNDED, evidence={"dtype": str(dtype).removeprefix("torch."), **_rows(found)}
            )
    return None


def stale_weight(case: Case) -> Explanation | None:
    """The wrong rows are those of an earlier checkpoint."""
    found = case.difference
    for name, checkpoint in case.surroundings.earlier.items():
        if found is None or case.expected.name not in checkpoint.names():
            continue
        earlier = replace(case.expected, checkpoint=checkpoint)
        if earlier.shape != case.actual.shape or earlier.dtype != case.actual.dtype:
            continue
        if case.surroundings.comparer.equal_rows(case.actual, earlier, found.rows):
            return Explanation(Cause.STALE_WEIGHT, evidence={"equals": name, **_rows(found)})
    return None


def duplicate_reduce(case: Case) -> Explanation | None:
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
    return Explanation(Cause.DUPLICATE_REDUCE, evidence={"factor": factor, **_rows(found)})


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


_MOST_SLICES = 1 << 20  # of which digests are held and looked up: 200 MB; no vocabulary is larger


def explain_tensor(case: Case) -> Explanation | None:
    """Return what happened to a tensor, or None where no test holds."""
    return first_explanation(case, _TESTS)


def _transposed(case: Case) -> Explanation | None:
    """The rows are the reference's columns."""
    actual, expected = case.actual, case.expected
    if len(expected.shape) != 2 or actual.shape != expected.shape[::-1] or min(expected.shape) < 2:
        return None
    return Explanation(Cause.TRANSPOSED) if torch.equal(slice_digests(actual, 0), slice_digests(expected, 1)) else None


def _layout(case: Case) -> Explanation | None:
    """Slices along a dim are the reference's, in other places or not all of them."""
    for dim in _dims(case):
        actual, expected = (slice_digests(side, dim).tolist() for side in (case.actual, case.expected))
        if len(set(expected)) < 2:
            continue  # nothing to tell slices apart by
        slices = Slices(
            runs=runs_of(actual, expected),
            num_actual=len(actual),
            num_expected=len(expected),
            is_vocabulary=case.is_vocabulary(dim),
            is_fused=FUSED_PARAMETER.matches(case.expected.name),
        )
        story = layout_story(slices)
        if story is not None:
            return replace(story, evidence={"dim": dim, **story.evidence})
    return None


def _dims(case: Case) -> Iterator[int]:
    """Yield the dims along which slices can be compared: the one whose size differs, or all where none does."""
    ours, theirs = case.actual.shape, case.expected.shape
    if len(ours) != len(theirs) or not case.actual.numel or not case.expected.numel:
        return
    unequal = [dim for dim, sizes in enumerate(zip(ours, theirs, strict=True)) if sizes[0] != sizes[1]]
    if len(unequal) <= 1:
        dims = unequal or [dim for dim, size in enumerate(theirs) if size > 1]
        yield from (dim for dim in dims if max(ours[dim], theirs[dim]) <= _MOST_SLICES)


def _another_layer(case: Case) -> Explanation | None:
    """The tensor is another one of the reference, of another layer or another name."""
    surroundings = case.surroundings
    reference = surroundings.reference
    if _is_constant(case.actual):
        return None  # ones or zeros are those of many a tensor
    for name in sorted(reference.names(), key=lambda name: _pattern(name) != _pattern(case.expected.name)):
        other = Stored(reference, name, case.expected.cast)
        if name != case.expected.name and surroundings.equal(case.actual, other):
            return Explanation(Cause.TENSOR_OF_ANOTHER_LAYER, evidence={"equals": name})
    return None


def _is_constant(tensor: Stored) -> bool:
    values = (bit_view(tensor.read(rows)).reshape(-1) for rows in tensor.pieces())
    return all(bool((piece == piece[0]).all()) for piece in values)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


_TESTS: tuple[Callable[[Case], Explanation | None], ...] = (
    bit_flipped, not_finite, all_zero, stale_weight, dtype_rounded, duplicate_reduce,
    _transposed, _another_layer, _layout,
)  # fmt: skip


def story_of(
    name: str, actual: torch.Tensor, expected: torch.Tensor, others: Mapping[str, torch.Tensor]
) -> Explanation | None:
    """Return what happened to a tensor that is not the expected one, or None where its bits do not tell.

    Args:
        name: Of the parameter.
        others: Other tensors that it may be instead, by name.
    """
    ours, theirs = _Tensors({name: actual}), _Tensors({**others, name: expected})
    pair = Stored(ours, name), Stored(theirs, name)
    difference = element_difference(*pair) if actual.shape == expected.shape else None
    with BitComparer() as comparer:
        return explain_tensor(Case(*pair, difference, Surroundings(theirs, {}, comparer)))


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Implements `adapters.Checkpoint` over a mapping."""

    tensors: Mapping[str, torch.Tensor]
    description: str = "tensors in memory"
    config: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[frozenset[str], ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    torn: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: range) -> torch.Tensor:
        tensor = self.tensors[name].detach()
        return (tensor[rows.start : rows.stop] if tensor.dim() else tensor).cpu().contiguous()

    def extent(self, name: str) -> None:
        return None

    def close(self) -> None:
        """There is nothing to let go of."""

    def require_unchanged(self) -> None:
        """Tensors in memory belong to this run alone."""
