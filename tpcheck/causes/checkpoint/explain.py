"""Tries every story on a tensor and keeps the first that its bits tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from tpcheck.causes.checkpoint.case import Case, Story
from tpcheck.causes.checkpoint.layouts import Slices, layout_story
from tpcheck.causes.checkpoint.runs import runs_of
from tpcheck.causes.checkpoint.values import (
    all_zero,
    bit_flipped,
    dtype_rounded,
    duplicate_reduce,
    not_finite,
    stale_weight,
)
from tpcheck.compare.slices import slice_digests
from tpcheck.compare.stored import Stored, bit_view

_MOST_SLICES = 1 << 20  # of which digests are held and looked up: 200 MB; no vocabulary is larger
_FUSED = re.compile(r"qkv|query_key_value|c_attn|kv_proj|kv_a|gate_up|gate_and_up|in_proj|wi\b|w13|linear_fc1|Wqkv")


def explain_tensor(case: Case) -> Story | None:
    """Return what happened to a tensor, or None where no test holds."""
    return next((story for test in _TESTS if (story := test(case)) is not None), None)


def _transposed(case: Case) -> Story | None:
    """The rows are the reference's columns."""
    actual, expected = case.actual, case.expected
    if len(expected.shape) != 2 or actual.shape != expected.shape[::-1] or min(expected.shape) < 2:
        return None
    return Story("transposed") if torch.equal(slice_digests(actual, 0), slice_digests(expected, 1)) else None


def _layout(case: Case) -> Story | None:
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
            is_fused=_FUSED.search(case.expected.name) is not None,
        )
        story = layout_story(slices)
        if story is not None:
            return replace(story, details={"dim": dim, **story.details})
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


def _another_layer(case: Case) -> Story | None:
    """The tensor is another one of the reference, of another layer or another name."""
    surroundings = case.surroundings
    reference = surroundings.reference
    if _is_constant(case.actual):
        return None  # ones or zeros are those of many a tensor
    for name in sorted(reference.names(), key=lambda name: _pattern(name) != _pattern(case.expected.name)):
        other = Stored(reference, name, case.expected.cast)
        if name != case.expected.name and surroundings.equal(case.actual, other):
            return Story("tensor_of_another_layer", {"equals": name})
    return None


def _is_constant(tensor: Stored) -> bool:
    values = (bit_view(tensor.read(rows)).reshape(-1) for rows in tensor.pieces())
    return all(bool((piece == piece[0]).all()) for piece in values)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


_TESTS: tuple[Callable[[Case], Story | None], ...] = (
    bit_flipped, not_finite, all_zero, stale_weight, dtype_rounded, duplicate_reduce,
    _transposed, _another_layer, _layout,
)  # fmt: skip
