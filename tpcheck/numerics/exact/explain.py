"""Explain what happened to a tensor that is not the expected one; each cause is named only where the bits show it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Checkpoint
from tpcheck.core.causes import Cause, Explanation, first_explanation
from tpcheck.core.name_maps import without_numbers
from tpcheck.families.special_cases import (
    FUSED_GATE_AND_UP,
    FUSED_KEY_AND_VALUE,
    FUSED_PARAMETER,
    ROTATED_PARAMETER,
    VOCABULARY_PARAMETER,
)
from tpcheck.numerics.exact.checkpoint_tensor import (
    BitComparer,
    CheckpointTensor,
    ElementDifference,
    bit_view,
    element_difference,
    is_constant,
)
from tpcheck.numerics.exact.rotary import rotary_order
from tpcheck.numerics.exact.slice_matching import Slices, explain_slices, find_runs, slice_digests

_NARROWER = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
_MIN_COUNT = 2  # one element that is zero, or a multiple, may be so by chance
_MIN_OFFSET = 8  # of the largest rounding error: a constant that one error in 2 x 8 bounds could hide is not named
_MAX_SLICES = 1 << 20  # slices whose digests are kept and looked up: 200 MB; no vocabulary is larger


@dataclass(frozen=True, slots=True)
class Context:
    """A tensor that is not the expected one, and what else it can be compared with.

    Attributes:
        actual, expected: Both tensors, of one dtype: where the stored dtypes differ, `expected` is rounded.
        difference: Which elements differ; None where the shapes differ.
        reference: The checkpoint that `expected` belongs to.
        earlier: Checkpoints of earlier steps by the name that the caller gave them; they use the reference's names.
        comparer: Compares bits.
    """

    actual: CheckpointTensor
    expected: CheckpointTensor
    difference: ElementDifference | None
    reference: Checkpoint
    earlier: Mapping[str, Checkpoint]
    comparer: BitComparer


def explain_tensor(context: Context) -> Explanation | None:
    """Return the first cause whose test holds, or None."""
    return first_explanation(context, TESTS)


def bit_flipped(context: Context) -> Explanation | None:
    """One bit of one element differs, other than the sign of a zero, which arithmetic changes, too."""
    difference = context.difference
    if difference is None or difference.count != 1 or difference.count_flipped != 1:
        return None
    if isinstance(difference.expected, float) and difference.actual == difference.expected:
        return None
    actual, expected = (bit_view(_element(side, difference.first)) for side in (context.actual, context.expected))
    changed = next(int(bits) for bits in (actual ^ expected).reshape(-1) if bits)
    bit = (changed & ((1 << 8 * actual.dtype.itemsize) - 1)).bit_length() - 1
    return Explanation(Cause.BIT_FLIPPED, evidence={"bit": bit, "index": list(difference.first)})


def not_finite(context: Context) -> Explanation | None:
    """Every wrong element is NaN or infinite."""
    difference = context.difference
    if difference is None or difference.count_not_finite != difference.count:
        return None
    return Explanation(Cause.NOT_FINITE, evidence={"count_not_finite": difference.count_not_finite})


def all_zero(context: Context) -> Explanation | None:
    """Every wrong element is zero."""
    difference = context.difference
    if difference is None or difference.count_zero != difference.count:
        return None
    if difference.count < min(_MIN_COUNT, difference.total):
        return None
    return Explanation(Cause.ALL_ZERO, evidence=_rows(difference))


def stale_weight(context: Context) -> Explanation | None:
    """The wrong rows are those of an earlier checkpoint, or the wrong elements where a partition ends within a row."""
    difference = context.difference
    for name, checkpoint in context.earlier.items():
        if difference is None or context.expected.name not in checkpoint.names():
            continue
        earlier = replace(context.expected, checkpoint=checkpoint)
        same_kind = earlier.shape == context.actual.shape and earlier.dtype == context.actual.dtype
        if same_kind and (
            context.comparer.equal_rows(context.actual, earlier, difference.rows)
            or _equal_where_wrong(context.actual, context.expected, earlier, difference)
        ):
            return Explanation(Cause.STALE_WEIGHT, evidence={"equals": name, **_rows(difference)})
    return None


def _equal_where_wrong(
    actual: CheckpointTensor, expected: CheckpointTensor, other: CheckpointTensor, difference: ElementDifference
) -> bool:
    if difference.count < _MIN_COUNT:
        return False
    for piece in expected.pieces(difference.rows):
        actual_bits, expected_bits, other_bits = (bit_view(side.read(piece)) for side in (actual, expected, other))
        wrong = actual_bits != expected_bits
        if not torch.equal(actual_bits[wrong], other_bits[wrong]):
            return False
    return True


def dtype_rounded(context: Context) -> Explanation | None:
    """The wrong rows are the expected ones, rounded to a narrower dtype on the way."""
    difference, expected = context.difference, context.expected
    if difference is None or not expected.dtype.is_floating_point:
        return None
    for dtype in _NARROWER:
        if dtype.itemsize < expected.dtype.itemsize and all(
            torch.equal(
                bit_view(context.actual.read(piece)), bit_view(expected.read(piece).to(dtype).to(expected.dtype))
            )
            for piece in expected.pieces(difference.rows)
        ):
            evidence = {"dtype": str(dtype).removeprefix("torch."), **_rows(difference)}
            return Explanation(Cause.DTYPE_ROUNDED, evidence=evidence)
    return None


def duplicate_reduce(context: Context) -> Explanation | None:
    """Every wrong element is the same small multiple of the expected one: copies of a replica were added up."""
    difference = context.difference
    if difference is None or not context.expected.dtype.is_floating_point or difference.count < _MIN_COUNT:
        return None
    if not isinstance(difference.actual, float) or not isinstance(difference.expected, float):
        return None
    ratio = difference.actual / difference.expected if difference.expected else 0.0
    factor = round(ratio) if abs(ratio) < 1e3 else 0  # no group of replicas is larger
    if factor < 2 or not all(
        torch.equal(context.actual.read(rows), context.expected.read(rows) * factor)
        for rows in context.expected.pieces(difference.rows)
    ):
        return None
    return Explanation(Cause.DUPLICATE_REDUCE, evidence={"factor": factor, **_rows(difference)})


def offset_by_constant(context: Context) -> Explanation | None:
    """Every wrong element of a vector, as norms' weights are, is the expected one plus one constant, rounded once.

    Rounding moves a result by half a unit in its last place at most, so that each element bounds the constant from both
    sides; one constant must lie within all bounds. It must stand out from the rounding, and so must the differences
    between the elements: otherwise a tensor that is nearly constant is any other one plus a constant.
    """
    difference, expected = context.difference, context.expected
    is_vector = len(expected.shape) == 1 and expected.dtype.is_floating_point and expected.dtype.itemsize > 1
    if difference is None or not is_vector or difference.count < max(_MIN_COUNT, len(difference.rows)):
        return None  # or some of the elements in between are right
    lowest, highest, rounding, smallest, largest = -inf, inf, 0.0, inf, -inf
    half_ulp = torch.finfo(expected.dtype).eps / 2
    for piece in expected.pieces(difference.rows):
        new, old = (side.read(piece).double() for side in (context.actual, expected))
        bound = torch.maximum(new.abs(), old.abs()) * half_ulp
        lowest = max(lowest, float((new - old - bound).max()))
        highest = min(highest, float((new - old + bound).min()))
        rounding = max(rounding, float(bound.max()))
        smallest, largest = min(smallest, float(old.min())), max(largest, float(old.max()))
        if not lowest <= highest:  # NaN, too
            return None
    constant = next((whole for whole in (1.0, -1.0) if lowest <= whole <= highest), (lowest + highest) / 2)
    if min(abs(constant), largest - smallest) <= _MIN_OFFSET * rounding:
        return None
    return Explanation(Cause.OFFSET_BY_CONSTANT, evidence={"constant": constant, **_rows(difference)})


def _rows(difference: ElementDifference) -> dict[str, list[int]]:
    return {"rows": [difference.rows.start, difference.rows.stop]}


def _element(tensor: CheckpointTensor, index: tuple[int, ...]) -> torch.Tensor:
    if not index:
        return tensor.read(range(1)).reshape(1)
    row = tensor.read(range(index[0], index[0] + 1))[0]
    return row[index[1:]].reshape(1)


def transposed(context: Context) -> Explanation | None:
    """The rows are the expected columns; of a stack of matrices, as of experts, those of each."""
    actual, expected = context.actual, context.expected
    stack, matrix = expected.shape[:-2], expected.shape[-2:]
    if len(matrix) < 2 or actual.shape != (*stack, *matrix[::-1]) or min(matrix) < 2 or not expected.numel:
        return None
    if not stack:
        are_equal = torch.equal(slice_digests(actual, 0), slice_digests(expected, 1))
    else:
        are_equal = all(
            torch.equal(bit_view(actual.read(piece).transpose(-2, -1)), bit_view(expected.read(piece)))
            for piece in expected.pieces()
        )
    return Explanation(Cause.TRANSPOSED) if are_equal else None


# Two parameters of one layer that have one shape, by the words of their names that tell them apart.
_PARTNERS: Mapping[Cause, tuple[tuple[str, str], ...]] = {
    Cause.GATE_UP_EXCHANGED: (("gate", "up"), ("w1", "w3"), ("wi_0", "wi_1"), ("c_fc_0", "c_fc_1")),
    Cause.KEY_VALUE_EXCHANGED: (("k", "v"), ("key", "value"), ("keys", "values"), ("wk", "wv")),
}


def exchanged_with_partner(context: Context) -> Explanation | None:
    """Where this tensor is wrong it holds its partner's elements, and the partner holds those of this one."""
    difference, names = context.difference, frozenset(context.reference.names())
    if difference is None:
        return None
    saved = frozenset(context.actual.checkpoint.names())
    for cause, rename in _renames_to_partner():
        name, actual_name = rename(context.expected.name), rename(context.actual.name)
        if name not in names or actual_name not in saved or name == context.expected.name:
            continue
        partner, actual_partner = replace(context.expected, name=name), replace(context.actual, name=actual_name)
        tensors = (context.actual, context.expected, actual_partner, partner)
        if len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1 and _are_exchanged(*tensors, difference.rows):
            return Explanation(cause, evidence={"partner": name, **_rows(difference)})
    return None


def _renames_to_partner() -> Iterator[tuple[Cause, Callable[[str], str]]]:
    """Yield functions that put one word of a pair in place of the other, where it is last in a name."""
    for cause, pairs in _PARTNERS.items():
        for pair in pairs:
            for word, other in (pair, pair[::-1]):
                pattern = re.compile(rf"(.*)(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])")
                yield cause, partial(pattern.sub, rf"\g<1>{other}", count=1)


def _are_exchanged(
    actual: CheckpointTensor,
    expected: CheckpointTensor,
    actual_partner: CheckpointTensor,
    expected_partner: CheckpointTensor,
    rows: range,
) -> bool:
    for piece in expected.pieces(rows):
        sides = (actual, expected, actual_partner, expected_partner)
        new, right, new_partner, right_partner = (bit_view(side.read(piece)) for side in sides)
        wrong = new != right
        if not torch.equal(new[wrong], right_partner[wrong]) or not torch.equal(new_partner[wrong], right[wrong]):
            return False
    return True


def another_layer(context: Context) -> Explanation | None:
    """The tensor equals another one of the reference; those whose names differ in numbers alone are tried first."""
    actual, expected = context.actual, context.expected
    if is_constant(actual):
        return None  # many tensors of a model are ones or zeros
    pattern = without_numbers(expected.name)
    for name in sorted(context.reference.names(), key=lambda name: without_numbers(name) != pattern):
        other = CheckpointTensor(context.reference, name, expected.cast)
        same_kind = name != expected.name and actual.shape == other.shape and actual.dtype == other.dtype
        if same_kind and context.comparer.equal(actual, other):
            return Explanation(Cause.TENSOR_OF_ANOTHER_LAYER, evidence={"equals": name})
    return None


def moved_slices(context: Context) -> Explanation | None:
    """Slices along a dim equal expected ones at other positions, or not all of them are there."""
    for dim in _comparable_dims(context.actual, context.expected):
        digests = [slice_digests(side, dim) for side in (context.actual, context.expected)]
        actual, expected = (side.tolist() for side in digests)
        if len(set(expected)) < 2:
            continue  # all slices are equal
        if len(actual) == len(expected) and ROTATED_PARAMETER.matches(context.expected.name):
            order = rotary_order(*digests)
            if order is not None:
                return Explanation(Cause.ROTARY_LAYOUT, evidence={"dim": dim, **order.evidence()})
        is_of_stack = dim < len(context.expected.shape) - 2  # slices are whole matrices, as of experts, and no blocks
        slices = Slices(
            runs=find_runs(actual, expected),
            num_actual=len(actual),
            num_expected=len(expected),
            is_vocabulary=_is_vocabulary(context, dim),
            is_fused=not is_of_stack and FUSED_PARAMETER.matches(context.expected.name),
            may_exchange=None if is_of_stack else _fused_pair(context.expected.name),
            num_keys=_num_keys(context.reference.config, len(expected)),
            min_length=2 if len(context.expected.shape) == 1 else 1,
        )
        explanation = explain_slices(slices)
        if explanation is not None:
            return replace(explanation, evidence={"dim": dim, **explanation.evidence})
    return None


def _fused_pair(name: str) -> Cause | None:
    """Return what it is called if two blocks of this fused parameter are exchanged."""
    if FUSED_GATE_AND_UP.matches(name):
        return Cause.GATE_UP_EXCHANGED
    return Cause.KEY_VALUE_EXCHANGED if FUSED_KEY_AND_VALUE.matches(name) else None


def _num_keys(config: Mapping[str, Any], num_rows: int) -> int | None:
    """Return how many rows of a fused Q, K and V are keys, by the model's configuration."""
    heads, key_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(key_heads, int) or heads < 1 or key_heads < 1:
        return None
    return num_rows * key_heads // (heads + 2 * key_heads)


def _comparable_dims(actual: CheckpointTensor, expected: CheckpointTensor) -> Iterator[int]:
    """Yield the dims along which slices can be compared: the one whose size differs, or all where none does."""
    if len(actual.shape) != len(expected.shape) or not actual.numel or not expected.numel:
        return
    sizes = list(zip(actual.shape, expected.shape, strict=True))
    unequal = [dim for dim, (size, expected_size) in enumerate(sizes) if size != expected_size]
    if len(unequal) <= 1:
        dims = unequal or [dim for dim, size in enumerate(expected.shape) if size > 1]
        yield from (dim for dim in dims if max(sizes[dim]) <= _MAX_SLICES)


def _is_vocabulary(context: Context, dim: int) -> bool:
    """Return whether the indices of `dim` are tokens, by the model's configuration or by the usual names."""
    size = context.reference.config.get("vocab_size")
    if isinstance(size, int):
        return context.expected.shape[dim] == size
    return dim == 0 and VOCABULARY_PARAMETER.matches(context.expected.name)


TESTS: tuple[Callable[[Context], Explanation | None], ...] = (
    bit_flipped,
    not_finite,
    all_zero,
    stale_weight,
    dtype_rounded,
    duplicate_reduce,
    offset_by_constant,
    transposed,
    exchanged_with_partner,
    another_layer,
    moved_slices,
)


def explain_tensor_in_memory(
    name: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    *,
    earlier: Mapping[str, torch.Tensor] | None = None,
    actual_others: Mapping[str, torch.Tensor] | None = None,
) -> Explanation | None:
    """Return what happened to a tensor that is not the expected one, or None where its bits do not show it.

    Args:
        name: Name of the parameter.
        others: Other tensors of the model by name, which `actual` may be instead.
        earlier: The same parameter at earlier steps, by the name of the step.
        actual_others: Other tensors of the model that `actual` belongs to, by name.
    """
    reference = _TensorsInMemory({**others, name: expected})
    tensors = (
        CheckpointTensor(_TensorsInMemory({**(actual_others or {}), name: actual}), name),
        CheckpointTensor(reference, name),
    )
    difference = element_difference(*tensors) if actual.shape == expected.shape else None
    steps = {step: _TensorsInMemory({name: tensor}) for step, tensor in (earlier or {}).items()}
    with BitComparer() as comparer:
        return explain_tensor(Context(*tensors, difference, reference, steps, comparer))


@dataclass(frozen=True, slots=True)
class _TensorsInMemory:
    """Implements `Checkpoint` over a mapping."""

    tensors: Mapping[str, torch.Tensor]
    description: str = "tensors in memory"
    config: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[frozenset[str], ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    inconsistent_replicas: Mapping[str, str] = field(default_factory=dict)

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
        """Do nothing: there is nothing to release."""

    def require_unchanged(self) -> None:
        """Do nothing: the tensors belong to this run alone."""
