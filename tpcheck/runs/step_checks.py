"""Checks of one step by what rounding may do: outputs, gradients, the norm, updates, optimizer states."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import hypot, prod, sqrt
from typing import Any

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.findings import Finding
from tpcheck.numerics.evidence import Evidence
from tpcheck.numerics.norms import NORM_CAUSES, GradientNorms, Matches, ObservedNorm, explain_norm
from tpcheck.numerics.sketch import GlobalIndex, Sketch, row_keys, sketch
from tpcheck.numerics.tolerance import (
    FITTED_RELATIVE_ERROR,
    SAFETY_FACTOR,
    TYPICAL_NOISE,
)
from tpcheck.runs.alignment import AlignedStep, Run
from tpcheck.runs.backward_sums import (
    at_sums_without_backward,
    feeding_module,
    is_summed_inside,
    residuals_before,
)
from tpcheck.runs.comparisons import ACTIVATIONS, Comparer, Comparison, Table, among_rerouted, label_of, margin
from tpcheck.runs.exact_checks import (
    BeforeAndAfter,
    differing_options,
    optimizer_of,
    options_as_evidence,
    options_finding,
    weights_moved,
)
from tpcheck.runs.full_tensors import FullTensors, explain_in_full
from tpcheck.runs.low_precision import is_near_limit, judged_among_neighbours, rerouted_among
from tpcheck.runs.run_findings import (
    GRADIENTS,
    NORM,
    OUTPUTS,
    STATES,
    UPDATES,
    Answer,
    Measured,
    finding_at,
    joined,
)
from tpcheck.runs.sketch_causes import (
    MicroBatches,
    Suspect,
    clip_factors,
    explain,
    sees_one_shard,
    share_of,
)
from tpcheck.runs.state_causes import replaced_state, stale_masters
from tpcheck.runs.wholes import Part, epsilon, parts_of, reading_of, total


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
            for (run, steps), replicas in zip(sides, (shared.actual, shared.expected), strict=True)
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
        return explanation or explain_in_full(self.full, comparison, comparisons)

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
        name = comparison.name if comparison.kind in ACTIVATIONS else comparison.name.rpartition(".")[0]
        if self.full.has(comparison.key):
            return "neither sketches nor the whole tensors of this step show a known cause"
        pattern = f"{name}*" if name else "*"
        return (
            "sketches alone show no cause: record both runs again with "
            f'tpcheck.record(model, path, steps=[{self.number}], modules="{pattern}", tensors="full", replays=2)'
        )

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


# ---- outputs and their gradients


def outputs_match(context: StepContext) -> Answer:
    """Compare the outputs of all modules, the loss among them."""
    context.comparer.doubtful, context.comparer.rerouted = [], set()
    comparisons, not_compared = _computed(context, "output")
    comparisons = judged_among_neighbours(comparisons, context.typical_noise)
    wrong = [each for each in comparisons if each.is_wrong]
    left_out, reasons = not_judged(context.comparer, wrong, comparisons)
    findings = _first_place(context, OUTPUTS, comparisons, [each for each in wrong if each not in left_out])
    return Answer.of(OUTPUTS, context.number, comparisons, findings, not_compared | reasons, left_out)


def doubtful_losses(context: StepContext, outputs: Answer) -> Answer:
    """Return the answer about outputs where gradients are wrong, too: with the losses that are wrong however read."""
    doubtful = context.comparer.doubtful
    findings = _first_place(context, OUTPUTS, doubtful, doubtful)
    labels = {label_of(each.key) for each in doubtful}
    not_compared = {name: reason for name, reason in outputs.not_compared.items() if name not in labels}
    return replace(outputs, findings=tuple(findings), not_compared=not_compared)


_PERMUTED = "its columns lie in another order over the ranks (a fused layer), as its norm and what follows from it show"


_REROUTED = (
    "it differs in a few rows, as where rounding to 16 bits sends tokens to other experts, and what follows is right"
)


def not_judged(
    comparer: Comparer, wrong: Sequence[Comparison], comparisons: Sequence[Comparison]
) -> tuple[list[Comparison], dict[str, str]]:
    """Return the wrong tensors that are no mistakes, and why, by label."""
    permuted = permuted_among(wrong, comparisons)
    keys = {each.key for each in permuted}
    others = [each for each in comparisons if each.key not in keys]
    rerouted = rerouted_among(others, is_known=bool(comparer.rerouted))
    comparer.rerouted |= {each.name for each in rerouted if each.name}
    reasons = {each.label: _PERMUTED for each in permuted} | {each.label: _REROUTED for each in rerouted}
    return [*permuted, *rerouted], reasons


def permuted_among(wrong: Sequence[Comparison], comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the wrong tensors of which only the guessed order of the ranks' shards is wrong.

    Where that is shown of a module, it holds for modules whose names differ in numbers alone.
    """
    shown = [each for each in wrong if may_be_permuted(each, comparisons)]
    patterns = {_without_numbers(each) for each in shown}
    return [each for each in wrong if keeps_norm(each) and _without_numbers(each) in patterns]


def _without_numbers(comparison: Comparison) -> tuple[str, str]:
    return re.sub(r"\d+", "#", comparison.name), comparison.part


def keeps_norm(comparison: Comparison) -> bool:
    """Return whether how the ranks' shards lie in the whole is guessed, and the norm is the expected one."""
    actual, expected = comparison.actual, comparison.expected
    is_guess = "dim" in actual.label or "dim" in expected.label
    return is_guess and comparison.allowed is not None and abs(actual.norm - expected.norm) <= comparison.allowed


def has_doubtful_order(comparer: Comparer, comparison: Comparison) -> bool:
    """Return whether a module's weights lie in another order than shapes suggest, which its output may follow."""
    return keeps_norm(comparison) and any(name.rpartition(".")[0] == comparison.name for name in comparer.permuted)


def may_be_permuted(comparison: Comparison, comparisons: Sequence[Comparison]) -> bool:
    """Return whether the ranks' shards of a wrong tensor are guessed to be in order, and only that guess is wrong.

    The norm is the expected one, and the tensors of the module around it, and the next one, are right.
    """
    if not keeps_norm(comparison):
        return False
    position = [each.key for each in comparisons].index(comparison.key)
    following = [each for each in comparisons[position + 1 :] if "dim" not in each.actual.label]
    return bool(following) and not following[0].is_wrong


def _computed(context: StepContext, kind: str) -> tuple[list[Comparison], dict[str, str]]:
    comparer, shared = context.comparer, context.step.shared
    if shared is None:
        return [], {}
    comparer.not_compared = {}
    comparisons = comparer.computed(
        context.actual,
        context.expected,
        kind,
        shared,
        loss_scales(context.step),
        context.scale,
        context.num_calls,
    )
    return comparisons, comparer.not_compared


def _first_place(
    context: StepContext, check: str, comparisons: Sequence[Comparison], wrong: Sequence[Comparison]
) -> list[Finding]:
    """Return the finding at the first wrong place, which lists what is wrong after it."""
    if not wrong:
        return []
    first = unreduced_before(comparisons, wrong[0]) or wrong[0]
    explanation = context.explain(first, comparisons)
    if explanation is None and has_doubtful_order(context.comparer, first):
        following = next((each for each in wrong if each.name != first.name), None)
        found = None if following is None else context.explain(following, comparisons)
        if following is not None and found is not None:  # then the order is that of a fused layer
            first, explanation = following, found
    if first is not wrong[0]:
        first = replace(first, terms_error=None)  # as replicas, which they were taken for by what follows
    followers = list(dict.fromkeys(each.name or "the model" for each in wrong if each.name != first.name))
    evidence: dict[str, Any] = {"first_of": len(wrong), **({"followed_by": followers} if followers else {})}
    if explanation is None:
        evidence["note"] = context.note_without_cause(first)
    return [finding_at(check, context.number, first, explanation, context.measured, evidence=evidence)]


def unreduced_before(comparisons: Sequence[Comparison], wrong: Comparison) -> Comparison | None:
    """Return the terms of a sum that nothing reduced before a wrong tensor: nothing after them, up to it, is right."""
    candidate = None
    for comparison in comparisons:
        if comparison.key == wrong.key:
            return candidate
        if comparison.is_reduced_later:
            candidate = candidate or comparison
        elif not comparison.is_wrong:
            candidate = None
    return None


# ---- gradients


def gradients_match(context: StepContext) -> Answer:
    """Compare gradients of outputs, then of parameters as the optimizer gets them."""
    number = context.number
    backward, not_compared = _computed(context, "output_gradient")
    backward = judged_among_neighbours(backward, context.typical_noise)
    wrong_backward = [each for each in backward if each.is_wrong]
    left_out, reasons = not_judged(context.comparer, wrong_backward, backward)
    not_compared |= reasons
    wrong_backward = [each for each in wrong_backward if each not in left_out]
    comparisons: list[Comparison] = []
    findings: list[Finding] = []
    if context.step.shared is not None and context.step.shared.is_whole_step:
        context.comparer.not_compared = {}
        comparisons = context.comparer.stored(context.actual, context.expected, ("gradient",), scale=context.scale)
        missing = _missing_gradients(context)
        not_compared |= {
            name: reason for name, reason in context.comparer.not_compared.items() if name not in missing.names
        }
        findings += at_sums_without_backward(missing.findings, backward, context.around.actual_after, context.run)
    comparisons = judged_among_neighbours(comparisons, context.typical_noise)
    wrong = [each for each in comparisons if each.is_wrong]
    rerouted = among_rerouted(context.comparer, [each for each in comparisons if is_near_limit(each)])
    left_out = [*left_out, *rerouted]
    not_compared |= {each.label: _REROUTED for each in rerouted}
    wrong = [each for each in wrong if each not in rerouted]
    factor = _common_factor(wrong_backward, backward)
    if factor is not None and comparisons and not wrong:
        scaled_together, wrong_backward = wrong_backward, []
        left_out = [*left_out, *scaled_together]
        not_compared |= {
            each.label: f"all are {factor:.6g} times the other run's, and the parameters' gradients agree: the loss is "
            "scaled in another place"
            for each in scaled_together
        }
    rounded = _factor_of_float32(wrong, comparisons)
    if rounded is not None:
        left_out, wrong = [*left_out, *wrong], []
        not_compared["factor of all gradients"] = (
            f"all are {rounded!r} times the other run's, as clipping by a norm in float32 rounds: how far weights and "
            "states are apart after it is given"
        )
    if wrong_backward:
        at_outputs = _first_place(context, GRADIENTS, backward, wrong_backward)
        shown: dict[str, Any] = {"parameters": [each.name for each in wrong]}
        if any("sum_in" in each.evidence for each in findings):
            shown |= {"follows_from": GRADIENTS, "note": "the branch whose gradients are missing is missing here, too"}
        findings += [replace(each, evidence={**each.evidence, **shown}) for each in at_outputs]
    elif wrong:
        findings += _wrong_gradients(context, wrong, comparisons)
    answer = Answer.of(GRADIENTS, number, [*backward, *comparisons], joined(findings), not_compared, left_out)
    return replace(answer, is_given=rounded is not None)


def _factor_of_float32(wrong: Sequence[Comparison], comparisons: Sequence[Comparison]) -> float | None:
    """Return the factor by which all gradients in float64 differ, where a norm in float32 rounds by as much."""
    if not wrong or len(wrong) < sum(1 for each in comparisons if each.expected.norm):
        return None
    factors = [explain_scale(each) for each in wrong if each.expected.dtype == "float64"]
    known = [factor for factor in factors if factor is not None]
    if len(known) < len(wrong):
        return None
    limit = SAFETY_FACTOR * epsilon("float32")
    is_near = all(abs(factor - 1) <= limit and abs(factor - known[0]) <= 1e-2 * abs(known[0] - 1) for factor in known)
    return known[0] if is_near else None


def _common_factor(wrong: Sequence[Comparison], comparisons: Sequence[Comparison]) -> float | None:
    """Return the factor by which all gradients of outputs differ; None where they differ otherwise, or some agree."""
    if not wrong or len(wrong) < sum(1 for each in comparisons if each.expected.norm):
        return None
    factors = []
    for each in wrong:
        explanation = explain_scale(each)
        if explanation is None:
            return None
        factors.append(explanation)
    return factors[0] if max(factors) - min(factors) <= 1e-2 * abs(factors[0]) else None


def explain_scale(comparison: Comparison) -> float | None:
    """Return the one factor by which a tensor differs from the expected one, where nothing else does."""
    factors = clip_factors(comparison)
    if factors is None or max(factors.values()) - min(factors.values()) > 1e-2 * abs(max(factors.values())):
        return None
    return next(iter(factors.values()))


def _wrong_gradients(
    context: StepContext, wrong: Sequence[Comparison], comparisons: Sequence[Comparison]
) -> list[Finding]:
    """Return findings at parameters whose gradients are wrong although all gradients of outputs are right."""
    clipped = _clipped_otherwise(context, wrong, comparisons)
    findings = []
    for each in wrong:
        explanation = clipped or context.explain(each, comparisons)
        evidence = {} if explanation else {"note": context.note_without_cause(each)}
        findings.append(finding_at(GRADIENTS, context.number, each, explanation, context.measured, evidence=evidence))
    return findings


@dataclass(frozen=True, slots=True)
class _Missing:
    findings: list[Finding] = field(default_factory=list)
    names: frozenset[str] = frozenset()


def _missing_gradients(context: StepContext) -> _Missing:
    """Find parameters without a gradient on ranks that hold them, where the expected run has one."""
    holders: dict[str, dict[int, str]] = {}
    for key, records in context.actual.items():
        if key[0] in ("gradient", "weight"):
            holders.setdefault(key[0] + key[1], {}).update(
                {rank: record.readings[0].piece for rank, record in records.items() if record.readings}
            )
    weights = {key[1] for key in context.actual if key[0] == "weight"}
    is_partitioned = any(
        holders.get("weight" + name, {}).get(rank, piece) != piece
        for name in weights
        for rank, piece in holders.get("gradient" + name, {}).items()
    )
    findings, labels = [], set()
    for key, records_e in context.expected.items():
        if key[0] != "gradient" or key[1] not in weights or is_partitioned:
            continue
        size = sum(reading.sketch.sum_squares for record in records_e.values() for reading in record.readings[:1])
        lacking = sorted(set(holders["weight" + key[1]]) - set(holders.get("gradient" + key[1], {})))
        if not size or not lacking or _is_dp_partition(context.run, lacking):
            continue
        labels.add(f"gradient of {key[1]}")
        findings.append(
            Finding(
                GRADIENTS,
                {"phase": "backward", "step": context.number, "parameter": key[1], "ranks": lacking},
                observed=float(len(lacking)),
                allowed=0.0,
                cause=Cause.GRADIENT_MISSING.slug,
                evidence={"counted": ["rank", "has no gradient", "have no gradient"], "missing_on_ranks": lacking},
            )
        )
    return _Missing(findings, frozenset(labels))


def _is_dp_partition(run: Run, lacking: Sequence[int]) -> bool:
    """Return whether some replica has the gradient on all of its ranks: it may be that replica's partition (ZeRO)."""
    return run.dp > 1 and any(not set(group) & set(lacking) for group in run.replicas)


# ---- norms and clipping

# Factors of parameters' gradients are those of one clipping where they are as near to each other.
_SAME_FACTOR = 1e-3


def _clipped_otherwise(
    context: StepContext, wrong: Sequence[Comparison], comparisons: Sequence[Comparison]
) -> Explanation | None:
    """Return by which norm each rank clipped, where all gradients differ by one factor a rank."""
    group = context.run.replicas[0]
    if len(group) < 2 or len(wrong) < max(1, len([each for each in comparisons if each.expected.norm]) // 2):
        return None
    factors: dict[int, list[float]] = {}
    for each in wrong:
        of_each = clip_factors(each)
        if of_each is None:
            return None
        for rank, factor in of_each.items():
            factors.setdefault(rank, []).append(factor)
    noise = max(FITTED_RELATIVE_ERROR, 100 * max(epsilon(each.expected.dtype) for each in wrong))
    if any(max(of_rank) - min(of_rank) > _SAME_FACTOR * abs(of_rank[0]) for of_rank in factors.values()):
        return None
    if not all(rank in factors for rank in group):
        return None
    # Every rank multiplied its gradients by c / N(rank), where the expected run multiplied them by c / N and has norm c
    # now. So the norm that a rank used, times that multiplier, is c: N(rank) is compared in units of clipped gradients.
    norms = norms_of_ranks(context, comparisons, group)
    if norms is None:
        return None
    clipped_to = hypot(*(each.expected.norm for each in comparisons))
    observed = ObservedNorm((clipped_to,) * len(group), norms.whole, noise, noise, unit=0.0)
    explanation = explain_norm(observed, norms).explanation
    if explanation is None:
        return None
    inverse = [1 / of_rank[0] if of_rank[0] else 0.0 for of_rank in (factors[rank] for rank in group)]
    if _is_round(inverse, len(group)) and not _is_clipped(context, clipped_to):
        return None
    shown = {str(rank): float(f"{factors[rank][0]:.6g}") for rank in group}
    return replace(explanation, evidence={**explanation.evidence, "factor_of_rank": shown, "clipped_to": clipped_to})


def _is_round(factors: Sequence[float], tp: int) -> bool:
    """Return whether the ranks share one factor that may be anything's: a number, or the root of one up to `tp`.

    A norm that is wrong by it, as one summed over the ranks, scales gradients no otherwise than a loss divided twice.
    """
    factor = factors[0]
    if any(abs(other - factor) > _SAME_FACTOR * abs(factor) for other in factors):
        return False
    numbers = [each for each in (factor, 1 / factor) if each >= 1] if factor > 0 else []
    roots = [each**2 for each in numbers if each**2 < tp + 0.5]
    return any(round(each) > 1 and abs(each - round(each)) <= _SAME_FACTOR * each for each in (*numbers, *roots))


def _is_clipped(context: StepContext, norm: float) -> bool:
    """Return whether the expected run says that its gradients, which have this norm now, had a larger one."""
    reported = [step.reported_norm for step in context.step.expected.values() if step.reported_norm is not None]
    return any(each > norm * (1 + _SAME_FACTOR) for each in reported)


def norms_of_ranks(
    context: StepContext, comparisons: Sequence[Comparison], group: Sequence[int]
) -> GradientNorms | None:
    """Return the norms of the actual run's gradients; None where a tensor's pieces are not those of one TP group."""
    by_rank: dict[int, dict[str, float]] = {rank: {} for rank in group}
    replicated = set()
    for each in comparisons:
        parts = each.actual.parts
        if each.is_of_norms or not all(rank in parts for rank in group):
            return None
        if len({parts[rank].piece for rank in group}) == 1:
            replicated.add(each.name)
        for rank in group:
            by_rank[rank][each.name] = sqrt(parts[rank].sketch.sum_squares)
    vectors = frozenset(each.name for each in comparisons if len(each.expected.shape) < 2)
    matrices = frozenset(each.name for each in comparisons) - vectors
    kinds = {"every vector": vectors, "every matrix": matrices}
    return GradientNorms(tuple(by_rank[rank] for rank in group), frozenset(replicated), kinds=kinds)


def norm_matches(context: StepContext, gradients: Answer) -> Answer:
    """Is the norm that the loop says it clipped by that of all gradients?

    Clipped gradients are smaller than that norm: then it is compared with the norm that the other run tells.
    """
    number = context.number
    comparisons = [each for each in gradients.comparisons if each.kind == "gradient"]
    reported = {
        rank: step.reported_norm for rank, step in context.step.actual.items() if step.reported_norm is not None
    }
    clipping = [finding for finding in gradients.findings if finding.cause in NORM_CAUSES]
    if clipping:
        first = clipping[0]
        where = {"phase": "update", "step": number, "ranks": first.where.get("ranks", [])}
        return Answer(NORM, number, findings=(replace(first, check=NORM, where=where),))
    if not reported:
        reason = (
            "the actual run reports no norm that it clips by: its gradients are compared as they are after clipping"
        )
        return Answer(NORM, -1, not_compared={"gradient norm": reason})  # once for all steps
    own = hypot(*(each.actual.norm for each in comparisons))
    told_e = next(
        (step.reported_norm for step in context.step.expected.values() if step.reported_norm is not None), None
    )
    eps = max([epsilon(each.actual.dtype) for each in comparisons] or [epsilon("float32")])
    eps = max(eps, epsilon("float32"))
    is_complete = bool(comparisons) and not any(label.startswith("gradient of") for label in gradients.not_compared)
    expected = told_e
    if expected is None:
        if not is_complete:
            reason = "the norm that the expected run clips by is unknown, and not all gradients were compared"
            return Answer(NORM, number, not_compared={"gradient norm": reason})
        if all(norm > own * (1 + SAFETY_FACTOR * eps) for norm in reported.values()):
            reason = "gradients are clipped, and the norm that the expected run clips by is unknown"
            return Answer(NORM, number, not_compared={"gradient norm": reason})
        expected = own
    deviations = [each.deviation or 0.0 for each in comparisons] if told_e is not None else []
    unclipped = told_e / own if told_e is not None and own else 1.0
    allowed = SAFETY_FACTOR * max(2 * eps * expected, hypot(*deviations) * max(1.0, unclipped))
    wrong = {rank: norm for rank, norm in reported.items() if not abs(norm - expected) <= allowed}
    error = max(abs(norm - expected) for norm in reported.values())
    margins = {"gradient norm": margin(error, allowed)}
    is_measured = told_e is None or bool(context.measured.replays)
    if not wrong or not is_measured:
        return Answer(NORM, number, margins if is_measured else {})
    group = context.run.replicas[0]
    norms = norms_of_ranks(context, comparisons, group) if is_complete else None
    matches = Matches()
    if norms is not None and norms.whole and all(rank in reported for rank in group):
        before = expected / norms.whole  # by which clipping made them smaller
        noise = max(10 * eps, allowed / expected / 10)
        used = tuple(reported[rank] / before for rank in group)
        matches = explain_norm(
            ObservedNorm(used, norms.whole, noise, noise, scales=_scales(context), unit=before), norms
        )
    explanation = matches.explanation
    evidence = {
        "norm_actual": [reported[rank] for rank in sorted(reported)],
        "norm_expected": expected,
        "dtype": context.measured.dtype,
        **({"norm_could_be": list(matches.could_be)} if matches.could_be else {}),
        **(explanation.evidence if explanation else {}),
    }
    relative_error = error / expected if expected else error
    finding = Finding(
        NORM,
        {"phase": "update", "step": number, "ranks": sorted(wrong)},
        relative_error,
        allowed / expected if expected else allowed,
        explanation.cause.slug if explanation else None,
        evidence,
    )
    return Answer(NORM, number, margins, (finding,))


def _scales(context: StepContext) -> dict[str, float]:
    """Return by what gradients are multiplied before they are unscaled."""
    known = {
        "the number of micro-batches": float(context.num_passes),
        "the number of replicas": float(context.run.dp),
        "the loss scale": loss_scales(context.step)[0],
    }
    return {what: scale for what, scale in known.items() if scale > 1}


# ---- updates


def updates_match(context: StepContext, gradients: Answer) -> Answer:
    """Compare weights and buffers after the step."""
    number, comparer = context.number, context.comparer
    comparer.not_compared = {}
    differing = differing_options(comparer, context.step)
    if not all(step.has_update for step in (*context.step.actual.values(), *context.step.expected.values())):
        return Answer(UPDATES, number, not_compared={"weights": "no optimizer step followed these calls"})
    moved = weights_moved(number, context.around, context.actual)
    comparisons = comparer.stored(
        context.around.actual_after, context.around.expected_after, ("weight", "buffer"), scale=context.scale
    )
    not_compared = dict(comparer.not_compared)
    if not context.is_update_judged:
        given = {
            each.label: "weights before the step were not recorded, so what is different is given"
            for each in comparisons
        }
        return Answer.of(UPDATES, number, comparisons, moved.findings, {**not_compared, **given}, comparisons)
    has_gradient = {each.name for each in gradients.comparisons if each.kind == "gradient"}
    comparisons = judged_among_neighbours(comparisons, context.typical_noise)
    wrong = [each for each in comparisons if each.is_wrong]
    rerouted = among_rerouted(comparer, [each for each in comparisons if is_near_limit(each)])
    not_compared |= {each.label: _REROUTED for each in rerouted}
    wrong = [each for each in wrong if each not in rerouted]
    undecayed = [each for each in wrong if each.kind == "weight" and has_gradient and each.name not in has_gradient]
    for each in undecayed:
        if not any(label.endswith(each.name) for label in gradients.not_compared):
            not_compared[each.label] = "it has no gradient, and optimizers differ in whether they decay it"
    wrong = [each for each in wrong if each not in undecayed]
    findings = list(moved.findings)
    stale_names = {name for each in findings for name in (each.where["parameter"], *each.evidence["also"])}
    explained_otherwise = [each for each in wrong if each.name not in stale_names]
    gradients_agree = not gradients.findings
    for each in explained_otherwise:
        explanation, evidence = _explain_update(context, each, differing, gradients_agree)
        findings.append(finding_at(UPDATES, number, each, explanation, context.measured, evidence=evidence))
    findings = joined(findings)
    if differing and not findings and not context.measured.replays and gradients_agree:
        findings = [options_finding(number, differing)]
    elif differing and not findings:
        not_compared[f"options of {next(iter(differing))}"] = (
            f"the optimizers' options differ ({_phrase(differing)}), and the updates agree"
        )
    answer = Answer.of(UPDATES, number, comparisons, findings, not_compared, [*undecayed, *rerouted])
    return replace(answer, margins={**answer.margins, **moved.margins})


def _phrase(differing: Mapping[str, Mapping[str, Any]]) -> str:
    options = next(iter(differing.values()))
    return ", ".join(f"{name} {actual} and {expected}" for name, (actual, expected) in options.items())


def _explain_update(
    context: StepContext, comparison: Comparison, differing: Mapping[str, Mapping[str, Any]], gradients_agree: bool
) -> tuple[Explanation | None, dict[str, Any]]:
    """Return the cause of a wrong weight, and what its move is beside the expected one."""
    evidence: dict[str, Any] = {}
    ratio = _update_ratio(context, comparison)
    if ratio is not None:
        evidence["update_ratio"] = float(f"{ratio:.6g}")
    of_parameter = differing.get(comparison.name)
    explanation = explain(context.suspect(comparison))
    if explanation is None and gradients_agree:
        explanation = explain_in_full(context.full, comparison, (comparison,))
    if explanation is not None or not gradients_agree or comparison.kind != "weight":
        return explanation, evidence
    if of_parameter:
        shown = options_as_evidence({comparison.name: of_parameter})
        return Explanation(Cause.OPTIONS_DIFFER, evidence=shown), evidence
    optimizer = optimizer_of(context.comparer, context.step.actual, comparison.name)
    for test in (
        partial(stale_masters, context.around.actual_before, comparison.name, comparison.actual.label),
        partial(sees_one_shard, optimizer, comparison.actual),
        partial(replaced_state, context.comparer, context.step, context.around, comparison.name),
        partial(_replicas_drifted, context, comparison),
    ):
        found = test()
        if found is not None:
            return found, evidence
    if optimizer:
        evidence["optimizer"] = optimizer
    return None, evidence


def _before(context: StepContext, comparison: Comparison) -> tuple[Sketch, Sketch] | None:
    """Return the weights of both runs before the step; None where they were not recorded."""
    found = []
    sides = (
        (context.around.actual_before, comparison.actual),
        (context.around.expected_before, comparison.expected),
    )
    for table, whole in sides:
        records = table.get(("weight", comparison.name, "", 0), {})
        known = {
            rank: record
            for rank, record in records.items()
            if any(reading.label == whole.label for reading in record.readings)
        }
        if not known:
            return None
        pieces = {part.piece: part.sketch for part in parts_of(known, whole.label).values()}
        found.append(total(pieces.values()))
    return found[0], found[1]


def _update_ratio(context: StepContext, comparison: Comparison) -> float | None:
    """Return the share of the expected move that the weight moved by; None where there is no move."""
    before = _before(context, comparison) if comparison.kind == "weight" and not comparison.is_of_norms else None
    if before is None:
        return None
    worst = max(zip(comparison.errors, comparison.actual.variants, strict=True), key=lambda each: each[0])[1]
    return share_of(worst.sketch - before[0], comparison.expected.sketch - before[1]) or None


def _replicas_drifted(context: StepContext, comparison: Comparison) -> Explanation | None:
    """Some replicas are right and others are wrong, although their gradients agree."""
    allowed = comparison.allowed or 0.0
    right = [error <= allowed for error in comparison.errors]
    return Explanation(Cause.REPLICA_DRIFT) if any(right) and not all(right) else None


# ---- optimizer states


def states_match(context: StepContext, gradients: Answer) -> Answer:
    """Compare moments and masters after the step."""
    number, comparer = context.number, context.comparer
    comparer.not_compared = {}
    around = context.around
    comparisons = comparer.stored(around.actual_after, around.expected_after, ("state", "master"), scale=context.scale)
    not_compared = dict(comparer.not_compared)
    if not context.is_update_judged:
        given = {
            each.label: "states before the step were not recorded, so what is different is given"
            for each in comparisons
        }
        return Answer.of(STATES, number, comparisons, (), {**not_compared, **given}, comparisons)
    findings = []
    comparisons = judged_among_neighbours(comparisons, context.typical_noise)
    wrong = [each for each in comparisons if each.is_wrong]
    rerouted = among_rerouted(comparer, [each for each in comparisons if is_near_limit(each)])
    not_compared |= {each.label: _REROUTED for each in rerouted}
    wrong = [each for each in wrong if each not in rerouted]
    differing = differing_options(comparer, context.step)
    for each in wrong:
        explanation = explain(context.suspect(each))
        if explanation is None and not gradients.findings and each.name in differing:
            shown = options_as_evidence({each.name: differing[each.name]})
            explanation = Explanation(Cause.OPTIONS_DIFFER, evidence=shown)
        if explanation is None and not gradients.findings:
            tests: tuple[Callable[[], Explanation | None], ...] = (
                partial(replaced_state, comparer, context.step, around, each.name),
                partial(stale_masters, around.actual_after, each.name, each.actual.label),
                partial(_replicas_drifted, context, each),
            )
            explanation = next((found for test in tests if (found := test()) is not None), None)
        findings.append(finding_at(STATES, number, each, explanation, context.measured))
    return Answer.of(STATES, number, comparisons, joined(findings), not_compared, rerouted)
