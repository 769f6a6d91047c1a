"""One step of both runs, ready to be compared, and the tensors of its parameters judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod, sqrt

import torch

from tpcheck.core.causes import Explanation
from tpcheck.numerics.evidence import Evidence
from tpcheck.numerics.sketch import GlobalIndex, Sketch, row_keys, sketch
from tpcheck.numerics.tolerance import TYPICAL_NOISE
from tpcheck.runs.comparing.alignment import AlignedStep, Run
from tpcheck.runs.comparing.backward_sums import feeding_module, is_summed_inside, residuals_before
from tpcheck.runs.comparing.comparisons import ACTIVATIONS, Comparer, Comparison, Table, among_rerouted
from tpcheck.runs.comparing.exact_checks import BeforeAndAfter
from tpcheck.runs.comparing.full_tensors import FullTensors, explain_in_full
from tpcheck.runs.comparing.low_precision import is_near_limit, judged_among_neighbours
from tpcheck.runs.comparing.run_findings import Measured
from tpcheck.runs.comparing.sketch_causes import MicroBatches, Suspect, explain
from tpcheck.runs.comparing.slice_causes import GivenSlices
from tpcheck.runs.trace.wholes import Part, parts_of, reading_of, total

REROUTED = (
    "it differs in a few rows, as where rounding to 16 bits sends tokens to other experts, and what follows is right"
)


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step of both runs, ready to be compared.

    Attributes:
        comparer: Compares tensors.
        step: The step.
        actual, expected: Its tensors by key.
        around: Weights and states before and after it.
        measured: What findings say of how they were made.
        scale: By how much further than in the replays the runs were apart before the step.
        is_update_judged: Whether weights and states before the step were judged, so that those after it can be.
        gathered: Whole tensors that were read to find causes.
        typical_noise: How far apart tensors of 16 bits may be expected to be, in units of what rounding moves them by.
        adds_up: For each run 1 where its loss is the mean over all replicas, else the number of those over whose losses
            it is the sum: slices of sequences, or all replicas.
    """

    comparer: Comparer
    step: AlignedStep
    actual: Table
    expected: Table
    around: BeforeAndAfter
    measured: Measured
    scale: float = 1.0
    is_update_judged: bool = True
    typical_noise: float = TYPICAL_NOISE
    adds_up: tuple[int, int] = (1, 1)
    gathered: dict[tuple[str, int], Evidence] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return self.step.number

    @property
    def run(self) -> Run:
        return self.comparer.actual

    @property
    def num_passes(self) -> int:
        return max(len(step.passes) for step in self.step.actual.values())

    @property
    def num_calls(self) -> tuple[int, int]:
        """How often the models were called in this step, by the replicas that both runs gave the same samples."""
        shared, sides = self.step.shared, ((self.run, self.step.actual), (self.comparer.expected, self.step.expected))
        if shared is None:
            return 0, 0
        actual, expected = (
            sum(len(steps[run.replicas[replica][0]].passes) for replica in replicas)
            for (run, steps), replicas in zip(
                sides, (shared.actual[:: shared.actual_cp], shared.expected[:: shared.expected_cp]), strict=True
            )
        )
        return actual, expected

    def suspect(self, comparison: Comparison, comparisons: Sequence[Comparison] = ()) -> Suspect:
        """Return a wrong tensor with what the tests of causes need to know.

        Args:
            comparisons: All tensors of the phase, in the order of events.
        """
        suspect = Suspect(
            comparison,
            self.run.tp,
            self.run.dp,
            self.num_passes,
            is_first=bool(comparisons) and comparison.key == comparisons[0].key,
            micro_batches=self._micro_batches(comparison),
            ones=self._ones(comparison),
            bias_norm=self._bias_norm(comparison),
            slices=self._slices(),
        )
        if comparison.kind != "output_gradient" or not comparisons:
            return suspect
        feeding = feeding_module(comparisons, comparison)
        is_summed = (
            feeding is not None
            and feeding.actual.is_replicated_over_tp
            and is_summed_inside(feeding.name, self.actual, self.run)
        )
        return replace(suspect, residuals=residuals_before(comparisons, comparison), is_summed_inside=is_summed)

    def explain(self, comparison: Comparison, comparisons: Sequence[Comparison]) -> Explanation | None:
        """Return the cause that sketches show, else the one that whole tensors show where both runs kept them."""
        explanation = explain(self.suspect(comparison, comparisons))
        if explanation is not None or self.has_slices:
            return explanation
        return explain_in_full(self.full, comparison, comparisons)

    def _slices(self) -> GivenSlices | None:
        if self.run.cp == 1:
            return None
        given = {call.positions for step in self.step.actual.values() for call in step.passes}
        positions = next(iter(given)) if len(given) == 1 else ""
        return GivenSlices(self.run.first.order, positions, self.run.data_replicas)

    @property
    def has_slices(self) -> bool:
        """Whether whole tensors of activations are slices in one of the runs."""
        return self.run.cp > 1 or self.comparer.expected.cp > 1

    @property
    def full(self) -> FullTensors:
        around = self.around
        return FullTensors(
            self.comparer,
            self.actual,
            self.expected,
            around.actual_before,
            around.expected_before,
            self.step,
            loss_scales(self.step),
            self.gathered,
        )

    def note_without_cause(self, comparison: Comparison) -> str:
        """Return what to record where nothing showed a cause; or that whole tensors did not, either."""
        if (modes := self._modes()) is not None:
            return modes
        if (overflow := self._overflow_of_expected(comparison)) is not None:
            return overflow
        if self.has_slices:
            return "sketches show no known cause; whole tensors are not tested for runs with slices of sequences (cp)"
        name = comparison.name if comparison.kind in ACTIVATIONS else comparison.name.rpartition(".")[0]
        if self.full.has(comparison.key):
            return "neither sketches nor the whole tensors of this step show a known cause"
        pattern = f"{name}*" if name else "*"
        return (
            "sketches alone show no cause: record both runs again with "
            f'tpcheck.record(model, path, steps=[{self.number}], modules="{pattern}", tensors="full", replays=2)'
        )

    def _modes(self) -> str | None:
        """Return in which mode the models of the two runs are called in this step, where that differs."""
        actual, expected = (
            {call.is_training for step in steps.values() for call in step.passes}
            for steps in (self.step.actual, self.step.expected)
        )
        if actual == expected or len(actual) != 1 or len(expected) != 1:
            return None
        names = ["training" if True in modes else "evaluation" for modes in (actual, expected)]
        return f"the actual run's model is in {names[0]} mode in this step, the expected run's in {names[1]} mode"

    def _overflow_of_expected(self, comparison: Comparison) -> str | None:
        """Return that the expected run's tensor alone is not finite, and whether that run stepped all the same."""
        number = comparison.expected.sketch.nonfinite
        of_actual = max(variant.sketch.nonfinite for variant in comparison.actual.variants)
        if number <= of_actual:
            return None
        took = ", and it skipped the step" if all(step.is_skipped for step in self.step.expected.values()) else ""
        return f"{number} elements of the expected run's are not finite{took}; {of_actual} of the actual run's"

    def _ones(self, comparison: Comparison) -> Sketch | None:
        """Return a column of ones with the rows of an output; None where its rows are not those of all samples."""
        shape, shared = comparison.expected.shape, self.step.shared
        if comparison.kind != "output" or -1 not in shape or shared is None or not shared.is_whole_step:
            return None
        steps, run = self.step.expected, self.comparer.expected
        names = [name for group in run.replicas for call in steps[group[0]].passes for name in call.samples]
        names = list(dict.fromkeys(names))
        width = prod(size for size in shape if size != -1)
        num_rows = comparison.expected.sketch.numel // (width * shared.expected_copies)
        try:
            samples = torch.tensor([_signed(int(name, 16)) for name in names], dtype=torch.int64)
        except ValueError:
            return None
        if not names or num_rows % len(names):
            return None
        rows = row_keys(samples, num_rows // len(names))
        return sketch(torch.ones(num_rows, 1, dtype=torch.float64), GlobalIndex.whole((1,)), rows=rows)

    def _bias_norm(self, comparison: Comparison) -> float:
        records = self.around.expected_before.get(("weight", f"{comparison.name}.bias", "", 0), {})
        squares = {
            reading.piece: reading.sketch.sum_squares for record in records.values() for reading in record.readings[:1]
        }
        return sqrt(sum(squares.values()))

    def _micro_batches(self, comparison: Comparison) -> MicroBatches:
        if comparison.kind != "gradient":
            return MicroBatches()
        actual = _accumulated(self.actual, comparison.name, comparison.actual.label)
        expected = _accumulated(self.expected, comparison.name, comparison.expected.label)
        kept: dict[int, list[Sketch]] = {}
        for parts in actual:
            for rank, part in parts.items():
                kept.setdefault(rank, []).append(part.sketch)
        wholes: list[Sketch] = []
        is_reduced = len(comparison.expected.variants) == 1
        for parts in expected if is_reduced else ():
            whole = mean_over_replicas(parts, self.comparer.expected.replicas)
            if whole is None or whole.numel != comparison.expected.sketch.numel * self.comparer.expected.dp:
                wholes.clear()
                break
            wholes.append(whole)
        return MicroBatches({rank: tuple(sketches) for rank, sketches in kept.items()}, tuple(wholes))


def _accumulated(table: Table, name: str, label: str) -> list[dict[int, Part]]:
    """Return the ranks' gradients of a parameter as they stood before the second micro-batch, the third ..."""
    keys = [key for key in table if key[:2] == ("accumulated", name)]
    found = []
    for key in sorted(keys, key=lambda key: int(key[2]) if key[2].isdigit() else 0):
        read = {rank: record for rank, record in table[key].items() if reading_of(record, label) is not None}
        found.append(parts_of(read, label))
    return found


def mean_over_replicas(parts: Mapping[int, Part], replicas: Sequence[Sequence[int]]) -> Sketch | None:
    """Return the mean of the wholes that the replicas hold, each its own or all the mean already.

    None where a replica has none, or its ranks hold other bits of the same elements.
    """
    wholes = []
    for group in replicas:
        pieces: dict[str, Part] = {}
        for rank in group:
            part = parts.get(rank)
            if part is None or pieces.setdefault(part.piece, part).digest != part.digest:
                return None
        wholes.append(total(part.sketch for part in pieces.values()))
    return total(wholes).scaled(1 / len(wholes))


def _signed(word: int) -> int:
    """Return a 64-bit word as a signed integer."""
    return word - (1 << 64) if word >> 63 else word


def loss_scales(step: AlignedStep) -> tuple[float, float]:
    """Return by what the losses of the two runs are multiplied."""
    return next(iter(step.actual.values())).loss_scale, next(iter(step.expected.values())).loss_scale


@dataclass(frozen=True, slots=True)
class Judged:
    """Gradients, weights or states of a step.

    Attributes:
        comparisons: All of them.
        wrong: Those that are further off than allowed.
        rerouted: Those that are no mistakes: rounding sent tokens to other experts.
        reasons: Why these are not compared, by label.
    """

    comparisons: list[Comparison]
    wrong: list[Comparison]
    rerouted: list[Comparison]
    reasons: dict[str, str]


def judge(context: StepContext, comparisons: Sequence[Comparison]) -> Judged:
    """Judge tensors of parameters each among its neighbours, and leave out those of experts that got other tokens."""
    judged = judged_among_neighbours(comparisons, context.typical_noise)
    rerouted = among_rerouted(context.comparer, [each for each in judged if is_near_limit(each)])
    wrong = [each for each in judged if each.is_wrong and each not in rerouted]
    return Judged(judged, wrong, rerouted, {each.label: REROUTED for each in rerouted})
