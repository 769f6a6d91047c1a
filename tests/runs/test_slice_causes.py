"""What is wrong with slices of sequences is named on hand-made tensors where its test holds, and only there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from tpcheck import Topology
from tpcheck.core.causes import Cause
from tpcheck.numerics.sketch import GlobalIndex, row_keys, sketch
from tpcheck.runs.comparing.alignment import AlignedStep, Run
from tpcheck.runs.comparing.comparisons import Comparison, compare
from tpcheck.runs.comparing.sketch_causes import Suspect, explain
from tpcheck.runs.comparing.slice_causes import GivenSlices
from tpcheck.runs.comparing.slice_orders import in_common_order, slices_agree, unknown_slices
from tpcheck.runs.recording.slices import FROM_ZERO, digests_of_pieces
from tpcheck.runs.trace.records import PassRecord, RankTrace, Reading, StepRecord, TensorRecord
from tpcheck.runs.trace.wholes import computed, stored

BATCH, LENGTH, WIDTH = 3, 32, 8
HELD = {  # by order, the positions of both ranks
    "contiguous": [torch.arange(16), torch.arange(16) + 16],
    "zigzag": [torch.cat([torch.arange(8), torch.arange(8) + 24]), torch.arange(16) + 8],
}
SAMPLES = torch.arange(BATCH) + 1
RIGHT = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WRONG = RIGHT.flip(2)


def output(values: torch.Tensor, positions: torch.Tensor, order: str) -> TensorRecord:
    """Return the record of an output whose rows are those of the samples at these positions."""
    rows = row_keys(SAMPLES, LENGTH, positions)
    reading = Reading("whole", (-1, -1, WIDTH), "all", sketch(values, GlobalIndex.whole((WIDTH,)), rows=rows))
    digest = str(hash(tuple(values.flatten().tolist())))
    shape = tuple(values.shape)
    return TensorRecord("output", "layer", "", 0, "float64", shape, digest, (replace(reading, order=order),))


def outputs(order: str, parts: Sequence[torch.Tensor]) -> Comparison:
    """Return the comparison of what two ranks have with the right output."""
    records = {rank: output(part, HELD[order][rank], order) for rank, part in enumerate(parts)}
    actual = computed(records, "whole", ((0,), (1,)), 1.0)
    expected = computed({0: output(RIGHT, torch.arange(LENGTH), "")}, "whole", ((0,),), 1.0)
    return compare(("output", "layer", "", 0), actual, expected, 1e-9)


def with_wrong(order: str, wrong: Sequence[slice]) -> list[torch.Tensor]:
    """Return what the ranks have if some positions are wrong."""
    values = RIGHT.clone()
    for part in wrong:
        values[:, part] = WRONG[:, part]
    return [values[:, positions] for positions in HELD[order]]


@pytest.mark.parametrize(
    ("order", "wrong", "right_in", "ranks"),
    [
        ("contiguous", [slice(16, 32)], "the first part of the sequence", (1,)),
        ("zigzag", [slice(8, 32)], "the first part of the sequence", (0, 1)),
        ("zigzag", [slice(8, 24)], "the slice of the first rank", (1,)),
        ("zigzag", [slice(8, 16)], None, (1,)),
        ("contiguous", [slice(16)], None, (0,)),
        ("contiguous", [slice(32)], None, (0, 1)),
    ],
)
def test_a_slice_is_taken_for_the_first_where_that_alone_is_right(
    order: str, wrong: list[slice], right_in: str | None, ranks: tuple[int, ...]
) -> None:
    comparison = outputs(order, with_wrong(order, wrong))
    found = explain(Suspect(comparison, dp=2, slices=GivenSlices(order, "", ((0, 1),))))
    assert (found and found.evidence["right_in"]) == right_in
    assert found is None or found.cause is Cause.SLICE_TAKEN_FOR_FIRST
    assert comparison.wrong_ranks() == ranks
    assert explain(Suspect(comparison, dp=2)) is None


def test_equal_bits_of_the_ranks_are_evidence() -> None:
    first = RIGHT[:, :16]
    found = explain(
        Suspect(outputs("contiguous", [first, first]), dp=2, slices=GivenSlices("contiguous", "", ((0, 1),)))
    )
    assert found is not None
    assert found.evidence == {"right_in": "the first part of the sequence", "same_bits_on_ranks": [0, 1]}


@pytest.mark.parametrize(
    ("positions", "cause"),
    [
        (FROM_ZERO, Cause.SLICE_TAKEN_FOR_FIRST),
        ("contiguous", Cause.POSITIONS_OF_ANOTHER_ORDER),
        ("zigzag", None),
        ("", None),
    ],
)
def test_positions_that_are_not_those_of_the_slices_are_named(positions: str, cause: Cause | None) -> None:
    comparison = outputs("zigzag", with_wrong("zigzag", [slice(32)]))
    found = explain(Suspect(comparison, dp=2, slices=GivenSlices("zigzag", positions, ((0, 1),))))
    assert (found and found.cause) is cause


# ---- reductions over replicas, of which some have slices of the same samples


def gradient(values: Mapping[int, torch.Tensor]) -> Comparison:
    """Return the comparison of the ranks' gradients with the mean of four different ones."""
    records = {rank: gradient_record(each) for rank, each in values.items()}
    actual = stored(records, "layout", [(rank,) for rank in values])
    expected = stored({0: gradient_record(TERMS.mean(0))}, "layout", [(0,)])
    return compare(("gradient", "weight", "", 0), actual, expected, 1e-9)


def gradient_record(values: torch.Tensor) -> TensorRecord:
    shape = tuple(values.shape)
    reading = Reading("layout", shape, "all", sketch(values))
    return TensorRecord("gradient", "weight", "", 0, "float64", shape, str(values.sum().item()), (reading,))


TERMS = torch.randn(4, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
_SLOTS = GivenSlices("contiguous", "", ((0, 1), (2, 3)))  # dp 2 x cp 2


@pytest.mark.parametrize(
    ("values", "cause", "over"),
    [
        ([TERMS[[0, 2]].mean(0), TERMS[[1, 3]].mean(0)] * 2, Cause.MISSING_REDUCE, "cp"),
        ([TERMS[:2].mean(0)] * 2 + [TERMS[2:].mean(0)] * 2, Cause.MISSING_REDUCE, "dp"),
        ([*TERMS], Cause.MISSING_REDUCE, "dp and cp"),
        ([TERMS[[0, 2]].sum(0) / 4, TERMS[[1, 3]].sum(0) / 4] * 2, Cause.MISSING_REDUCE, "cp"),
        ([TERMS.sum(0)] * 4, Cause.SUM_INSTEAD_OF_MEAN, "dp and cp"),
        ([TERMS.mean(0) / 2] * 4, Cause.MEAN_INSTEAD_OF_SUM, "dp or cp"),
    ],
)
def test_a_wrong_reduction_names_the_axis(values: list[torch.Tensor], cause: Cause, over: str) -> None:
    found = explain(Suspect(gradient(dict(enumerate(values))), dp=4, slices=_SLOTS))
    assert found is not None
    assert (found.cause, found.evidence["reduced_over"]) == (cause, over)


# ---- samples


def trace(rank: int, tokens: torch.Tensor, sliced: Mapping[str, Sequence[str]], cp: int) -> RankTrace:
    pieces = digests_of_pieces(tokens, cp)
    assert pieces is not None
    text = tuple("".join(f"{key >> 32 & (1 << 32) - 1:08x}" for key in row) for row in pieces.tolist())
    samples = tuple(str(int(sample)) for sample in tokens[:, 0])
    orders = {order: tuple(digests) for order, digests in sliced.items()}
    call = PassRecord((), samples, None, True, sliced=orders, pieces=text)
    topology = Topology(cp=cp)
    group = tuple(range(cp)) if cp > 1 else ()
    step = StepRecord(0, True, (call,), ())
    return RankTrace(rank, topology, (rank,), (rank,), "float64", {}, 0, "Module", (), (step,), 1, cp_group=group)


def first_step(actual: Sequence[RankTrace], expected: Sequence[RankTrace]) -> tuple[AlignedStep, Run, Run]:
    runs = [Run.of(str(len(traces)), traces) for traces in in_common_order(actual, expected)]
    return AlignedStep(0, runs[0].steps(0), runs[1].steps(0), None), *runs


WHOLE = torch.arange(2 * LENGTH).reshape(2, LENGTH)  # named by their first tokens, 0 and 32
_RIGHT_SAMPLES, _OTHERS = ("0", "32"), ("5", "6")


def test_the_order_of_slices_is_that_of_the_other_runs_samples() -> None:
    orders = {"contiguous": _OTHERS, "zigzag": _RIGHT_SAMPLES}
    actual = [trace(rank, WHOLE[:, positions], orders, 2) for rank, positions in enumerate(HELD["zigzag"])]
    step, run, _ = first_step(actual, [trace(0, WHOLE, {}, 1)])
    assert step.actual[0].passes[0].samples == _RIGHT_SAMPLES
    assert (run.cp, run.replicas, run.data_replicas) == (2, ((0,), (1,)), ((0, 1),))


@pytest.mark.parametrize("num_slices", [2, 4])
def test_a_slice_of_another_sample_is_found_by_its_pieces(num_slices: int) -> None:
    held = [*torch.arange(LENGTH).chunk(num_slices)]
    tokens = [WHOLE[:, positions] for positions in held]
    tokens[1] = tokens[1].flip(0)
    orders = {"contiguous": _OTHERS}
    actual = [trace(rank, each, orders, num_slices) for rank, each in enumerate(tokens)]
    step, run, expected = first_step(actual, [trace(0, WHOLE, {}, 1)])
    [finding] = slices_agree(run, step, expected).findings
    assert finding.cause == Cause.SLICE_OF_ANOTHER_SAMPLE.slug
    assert finding.where["ranks"] == ([0, 1] if num_slices == 2 else [1])  # of two, nothing tells which
    assert "neither contiguous nor zigzag" in unknown_slices(step, run, expected)

    right = [trace(rank, WHOLE[:, positions], orders, num_slices) for rank, positions in enumerate(held)]
    step, run, expected = first_step(right, [trace(0, WHOLE, {}, 1)])
    answer = slices_agree(run, step, expected)
    assert answer.margins
    assert not answer.findings
    step, run, expected = first_step([replace(each, steps=(unsliced(each),)) for each in right], right)
    assert "slices of equal length" in unknown_slices(step, run, expected)


def unsliced(of: RankTrace) -> StepRecord:
    [call] = of.steps[0].passes
    return replace(of.steps[0], passes=(replace(call, sliced={}),))
