"""Runs whose ranks hold slices of sequences: read in the order in which the slices make up the other run's samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from tpcheck.core.causes import Cause, Explanation
from tpcheck.runs.comparing.alignment import AlignedStep, Run
from tpcheck.runs.comparing.run_findings import BATCHES, Answer, exact_finding
from tpcheck.runs.trace.files import ChangedSteps, numbers_of
from tpcheck.runs.trace.records import PassRecord, RankTrace, StepRecord, TensorRecord

_DIGITS = 8  # of the digest of a piece


def in_common_order(
    actual: Sequence[RankTrace], expected: Sequence[RankTrace]
) -> tuple[Sequence[RankTrace], Sequence[RankTrace]]:
    """Return both runs, of slices those in the order under which the runs have samples in common.

    The digest of a whole sample is that of another one in any other order. Where no order gives common samples, the
    first is taken: then the samples differ.
    """
    first = _first_common(actual, expected)
    samples_a, samples_e = _samples_by_order(actual, first), _samples_by_order(expected, first)
    order_a, order_e = max(
        product(samples_a, samples_e), key=lambda orders: (samples_a[orders[0]] & samples_e[orders[1]]).total()
    )
    return _in_order(actual, order_a), _in_order(expected, order_e)


def _first_common(actual: Sequence[RankTrace], expected: Sequence[RankTrace]) -> int:
    numbers = ({number for trace in traces for number in numbers_of(trace.steps)} for traces in (actual, expected))
    return min(set.intersection(*numbers), default=-1)


def _samples_by_order(traces: Sequence[RankTrace], number: int) -> dict[str, Counter[str]]:
    """Return the samples of a step under each order; under one without a name where nobody has slices."""
    if not any(trace.cp_group for trace in traces):
        return {"": Counter(name for call in _calls(traces, number) for name in call.samples)}
    by_order: dict[str, Counter[str]] = {}
    for call in _calls(traces, number):
        for order, samples in call.sliced.items():
            by_order.setdefault(order, Counter()).update(samples)
    return by_order or {"": Counter()}


def _calls(traces: Sequence[RankTrace], number: int) -> Iterator[PassRecord]:
    for trace in traces:
        for position, of_step in enumerate(numbers_of(trace.steps)):
            if of_step == number:
                yield from trace.steps[position].passes


def _in_order(traces: Sequence[RankTrace], order: str) -> Sequence[RankTrace]:
    def read(_: int, step: StepRecord) -> StepRecord:
        passes = tuple(replace(call, samples=call.sliced.get(order, ())) for call in step.passes)
        return replace(step, passes=passes, tensors=tuple(_read(record, order) for record in step.tensors))

    return [
        replace(trace, order=order, steps=ChangedSteps(trace.steps, read)) if trace.cp_group else trace
        for trace in traces
    ]


def _read(record: TensorRecord, order: str) -> TensorRecord:
    if not any(reading.order for reading in record.readings):
        return record
    return replace(record, readings=tuple(reading for reading in record.readings if reading.order in ("", order)))


def unknown_slices(step: AlignedStep, actual: Run, expected: Run) -> str:
    """Return what is to be said of runs without a common sample if it is unknown how slices lie; else nothing."""
    for run, steps in ((actual, step.actual), (expected, step.expected)):
        if run.cp == 1:
            continue
        if any(not call.samples for each in steps.values() for call in each.passes):
            return f"the ranks of a CP group of {run.path} were not called with slices of equal length of its sequences"
        return (
            f"the slices of {run.path} make up no sample of the other run, neither contiguous nor zigzag: the samples "
            "differ, or the slices lie otherwise, which position_ids in the arguments of the model tell"
        )
    return ""


# ---- slices of other samples


def slices_agree(run: Run, step: AlignedStep, expected: Run) -> Answer:
    """Do the ranks of each CP group hold slices of the same samples, by the pieces that the other run's samples have?

    Args:
        run: Whose samples the other run does not have.
    """
    owners = _owners(step, expected)
    margins: dict[str, float] = {}
    wrong: dict[int, str] = {}
    for replica in run.data_replicas if run.cp > 1 else ():
        groups = [run.replicas[number] for number in replica]
        margins[f"slices of ranks {', '.join(str(rank) for group in groups for rank in group)}"] = 0.0
        steps = [step.actual[group[0]].passes if group[0] in step.actual else () for group in groups]
        for calls in zip(*steps, strict=False):
            for pieces in zip(*(call.pieces for call in calls), strict=False):
                of_slices = [_samples_of(text, owners) for text in pieces]
                known = Counter(next(iter(each)) for each in of_slices if len(each) == 1)
                if not known:
                    continue
                usual, number = known.most_common(1)[0]
                others = [place for place, each in enumerate(of_slices) if usual not in each]
                for place in range(len(groups)) if number == 1 and others else others:
                    found = next(iter(of_slices[place]), "none of the other run's")
                    wrong |= dict.fromkeys(groups[place], found)
    if not wrong:
        return Answer(BATCHES, step.number, margins)
    where = {"step": step.number, "field": "slices of samples", "ranks": sorted(wrong)}
    evidence = {"sample_of_rank": {str(rank): wrong[rank] for rank in sorted(wrong)}}
    finding = exact_finding(
        BATCHES,
        where,
        len(wrong),
        ("rank", "has a slice of another sample", "have slices of different samples"),
        Explanation(Cause.SLICE_OF_ANOTHER_SAMPLE),
        evidence,
    )
    return Answer(BATCHES, step.number, margins, (finding,))


def _owners(step: AlignedStep, expected: Run) -> Mapping[str, set[str]]:
    """Return the samples of the expected run that have each piece."""
    owners: dict[str, set[str]] = {}
    for group in expected.replicas:
        for call in step.expected[group[0]].passes if group[0] in step.expected else ():
            for sample, text in zip(call.samples, call.pieces, strict=False):
                for piece in _pieces(text):
                    owners.setdefault(piece, set()).add(sample)
    return owners


def _samples_of(text: str, owners: Mapping[str, set[str]]) -> set[str]:
    """Return the samples that have most pieces of a slice; none where none has any."""
    counts = Counter(sample for piece in _pieces(text) for sample in owners.get(piece, ()))
    most = max(counts.values(), default=0)
    return {sample for sample, count in counts.items() if count == most}


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS))
