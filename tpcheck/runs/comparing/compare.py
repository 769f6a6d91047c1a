"""`compare_traces`: where two recorded runs first part, and whether that is rounding or a mistake."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict, with_nodes
from tpcheck.core.name_maps import NameMap, Names
from tpcheck.core.reproduce import compare_command
from tpcheck.numerics.evidence import MarginsByModule, modules_of, worst_by_module
from tpcheck.report.report import Report
from tpcheck.runs.comparing.alignment import AlignedStep, Run, aligned_steps
from tpcheck.runs.comparing.comparisons import Comparer, Comparison, Table, label_of
from tpcheck.runs.comparing.exact_checks import (
    BeforeAndAfter,
    are_alike,
    batches_agree,
    drew_other_random_numbers,
    first_other_bits,
    groups_agree,
    replicas_agree,
    same_inputs,
    same_start,
    steps_were_taken,
)
from tpcheck.runs.comparing.full_causes import CAUSES_OF_ORDER
from tpcheck.runs.comparing.full_tensors import FullTensors, explain_in_full
from tpcheck.runs.comparing.initial_weights import (
    drawn_separately,
    is_zero_on_one_side,
    left_at_zero,
    not_by_rounding,
    parted_unseen,
    too_far_apart,
)
from tpcheck.runs.comparing.low_precision import noise_of_weights
from tpcheck.runs.comparing.norm_checks import norm_matches
from tpcheck.runs.comparing.picture import PictureMaker
from tpcheck.runs.comparing.run_findings import (
    GRADIENTS,
    OUTPUTS,
    REPLICAS,
    STATES,
    UPDATES,
    WEIGHTS,
    Answer,
    Measured,
    exact_finding,
    finding_at,
    joined,
    names_in,
)
from tpcheck.runs.comparing.sketch_causes import Suspect, explain
from tpcheck.runs.comparing.slice_orders import in_common_order, slices_agree, unknown_slices
from tpcheck.runs.comparing.stages import has_stages, joined_verdict, stage_pairs
from tpcheck.runs.comparing.state_causes import repeated_state, stale_masters
from tpcheck.runs.comparing.step_checks import doubtful_losses, gradients_match, outputs_match, replicas_added_up
from tpcheck.runs.comparing.step_context import StepContext
from tpcheck.runs.comparing.update_checks import states_match, updates_match, weights_are_masters
from tpcheck.runs.trace.records import RankTrace, StepRecord
from tpcheck.runs.trace.wholes import epsilon

Paths: TypeAlias = str | Path | Sequence[str | Path]
_MOST_ERRORS_LISTED = 8
_CALIBRATED = (OUTPUTS, GRADIENTS, UPDATES, STATES)


def compare_traces(actual: Paths, expected: Paths, *, names: Names = None) -> Report:
    """Compare the trace of one run with that of another: any topology, dtype, engine or version.

    Steps are paired by number, samples by content, modules and parameters by name. What rounding may do was measured
    where one of the runs was recorded with `replays`; without, only exact checks are decided.

    Args:
        actual: Folder of the run that is judged; several where nodes do not share a disk.
        expected: Folder of the run that it should equal.
        names: Patterns and replacements that turn names of the actual run into those of the expected one, and names of
            ready maps: `{"^net[.]": "model."}`, `["hf-megatron"]`.

    Raises:
        UsageError: There is no trace at a path, a rank's is missing, or a pattern is wrong.
        TpcheckError: A trace is damaged.

    Example:
        >>> tpcheck.compare_traces("tp2.trace", "tp1.trace").raise_if_failed()  # doctest: +SKIP
    """
    from tpcheck.runs.trace.files import read_trace

    start = time.monotonic()
    name_map = NameMap.from_argument(names)
    actual_ranks, expected_ranks = in_common_order(read_trace(actual, "actual"), read_trace(expected, "expected"))
    if has_stages(actual_ranks) or has_stages(expected_ranks):
        report = _compare_stages(_shown(actual), actual_ranks, _shown(expected), expected_ranks, name_map)
    else:
        report = compare_runs(Run.of(_shown(actual), actual_ranks), Run.of(_shown(expected), expected_ranks), name_map)
    node_of = {trace.rank: trace.node for trace in actual_ranks if trace.node}
    findings = tuple(with_nodes(finding, node_of) for finding in report.verdict.findings)
    return replace(report, verdict=replace(report.verdict, findings=findings, seconds=time.monotonic() - start))


def _compare_stages(
    actual: str, actual_ranks: Sequence[RankTrace], expected: str, expected_ranks: Sequence[RankTrace], names: NameMap
) -> Report:
    """Compare each pair of pipeline stages that share parameters; the picture is that of the pair that fails first.

    Raises:
        UsageError: A run has other axes than those of its topology, or no two stages share a parameter.
    """
    Run.of(actual, actual_ranks), Run.of(expected, expected_ranks)  # raises for other axes before anything is compared
    reports = {
        pair.stages: compare_runs(Run.of(actual, pair.actual), Run.of(expected, pair.expected), names)
        for pair in stage_pairs(actual_ranks, expected_ranks, names)
    }
    if not reports:
        raise UsageError("actual", actual, f"a stage with a parameter of {expected}; names= maps names")
    stages = actual_ranks[0].topology.pp, expected_ranks[0].topology.pp
    verdict = joined_verdict({pair: report.verdict for pair, report in reports.items()}, stages)
    shown = next((report for report in reports.values() if report.findings), next(iter(reports.values())))
    return replace(shown, verdict=verdict)


def _shown(path: Paths) -> str:
    return str(path) if isinstance(path, (str, Path)) else ",".join(map(str, path))


def compare_runs(actual: Run, expected: Run, names: NameMap | None = None) -> Report:
    """Compare two runs whose traces were read; the report holds the picture of all errors."""
    comparison = _RunsComparison(actual, expected, Comparer(actual, expected, names or NameMap()))
    comparison.compare_start()
    comparison.compare_steps()
    return Report(comparison.verdict(), comparison.picture.picture())


@dataclass(slots=True)
class _RunsComparison:
    """Compares step after step, until one has findings.

    Attributes:
        actual, expected: The runs.
        comparer: Pairs and compares their tensors.
        answers: Of all checks so far.
        not_compared: Whole steps and ranks that were not compared, and why.
        notes: What else is to be said beside the verdict.
        before: Weights and states after the last step that both recorded, which is the one before the next, or None.
        doubtful_weights: Findings about weights at the start that hold only if the outputs of their modules are wrong.
        last_number: Of the step that `before` follows.
        scale: By how much further than in the replays the runs were apart from the start.
        too_far_apart: Why steps after such a start are not compared; empty where they are.
        num_steps: How many steps were compared.
        is_same_to_the_bit: Whether the runs are alike, and no bit has differed so far.
        margins: The worst ones of each module so far.
    """

    actual: Run
    expected: Run
    comparer: Comparer
    answers: list[Answer] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    picture: PictureMaker = field(default_factory=PictureMaker)
    before: tuple[Table, Table] = field(default_factory=lambda: ({}, {}))
    doubtful_weights: list[Finding] = field(default_factory=list)
    last_number: int = -1
    scale: float = 1.0
    too_far_apart: str = ""
    num_steps: int = 0
    is_same_to_the_bit: bool = False
    margins: MarginsByModule = field(default_factory=dict)

    @property
    def measured(self) -> Measured:
        dtypes = (self.actual.first.dtype, self.expected.first.dtype)
        return Measured(max(dtypes, key=epsilon), max(self.actual.replays, self.expected.replays))

    # ---- the start

    def compare_start(self) -> None:
        tables = tuple(
            self.comparer.table(run, {rank: run.ranks[rank].initial for rank in run.members})
            for run in (self.actual, self.expected)
        )
        self.before = (tables[0], tables[1])
        for run in (self.actual, self.expected):
            if run.missing_ranks:
                listed = ", ".join(map(str, run.missing_ranks))
                self.not_compared[f"ranks {listed} of {run.path}"] = (
                    "their traces are not in the folders that were given"
                )
        for run, other in ((self.actual, self.expected), (self.expected, self.actual)):
            for name, reason in run.not_recorded.items():
                if name != "replays" or not other.is_replayed:
                    self.not_compared[f"{name} of {run.path}"] = reason
        is_given = self.actual.has_other_history or self.expected.has_other_history
        weights = self._weights_at_start(is_given)
        answers = [groups_agree(self.actual), weights, self._states_at_start()]
        expected = replicas_agree(self.expected, tables[1], {}, -1)
        answers.append(replicas_agree(self.actual, tables[0], {}, -1, expected))
        self._add(answers)
        self.is_same_to_the_bit = are_alike(self.actual, self.expected) and same_start(self.actual, self.expected)

    def _weights_at_start(self, is_given: bool) -> Answer:
        """Compare the weights before the first step: to the rounding of the sketches' sums, for no step has moved them.

        A recording that begins in the middle of a training has the differences of all steps before: they are given.
        """
        comparer = self.comparer
        comparisons = comparer.initial(*self.before, ("weight", "buffer"))
        not_compared = dict(comparer.not_compared)
        comparer.not_compared = {}
        wrong = [each for each in comparisons if each.is_wrong]
        full = FullTensors(comparer, *self.before, *self.before)
        findings = []
        given: list[Comparison] = []
        if is_given:
            not_loaded = [*not_by_rounding(comparisons), *self._biases_not_loaded(comparisons)]
            wrong, given = not_loaded, [each for each in wrong if each not in not_loaded]
            not_compared |= self._given_at_start(comparisons, given, has_findings=bool(wrong))
        explanations = {
            each.key: explain(Suspect(each, self.actual.tp, self.actual.dp)) or explain_in_full(full, each, comparisons)
            for each in wrong
        }
        drawn = drawn_separately(comparisons, [each for each in wrong if explanations[each.key] is None])
        for each in wrong:
            explanation = explanations[each.key]
            finding = finding_at(WEIGHTS, -1, each, explanation or drawn, self.measured)
            if not may_lie_in_another_order(each, explanation):
                findings.append(finding)
                continue
            self.doubtful_weights.append(finding)
            comparer.permuted.add(each.name)
            not_compared[f"elements of {each.label}"] = (
                "they lie in another order over the ranks than the shapes suggest (a fused layer): the norms alone of "
                "this parameter, its gradients and its states are compared"
            )
        left_out = [*given, *(each for each in wrong if each.name in comparer.permuted)]
        return Answer.of(WEIGHTS, -1, comparisons, joined(findings), not_compared, left_out)

    def _biases_not_loaded(self, comparisons: Sequence[Comparison]) -> list[Comparison]:
        """Return biases that one run has not loaded, as their gradients in the first step that both recorded show."""
        number = min({*self.actual.numbers} & {*self.expected.numbers}, default=None)
        if number is None or not any(map(is_zero_on_one_side, comparisons)):
            return []
        actual, expected = (
            self.comparer.table(run, {rank: record.tensors for rank, record in run.steps(number).items()})
            for run in (self.actual, self.expected)
        )
        gradients = self.comparer.stored(actual, expected, ("gradient",))
        self.comparer.not_compared = {}
        return left_at_zero(comparisons, gradients)

    def _given_at_start(
        self, comparisons: Sequence[Comparison], given: Sequence[Comparison], *, has_findings: bool
    ) -> dict[str, str]:
        """Take weights as given that the steps before the recording have moved apart; return why, by label."""
        biases = [each for each in given if each.name.endswith("bias")]
        self.scale = max([1.0, *(_in_units_of_rounding(each) for each in given if each not in biases)])
        self.comparer.given = {each.name: each.error for each in biases}
        if not has_findings:
            self.too_far_apart = too_far_apart(comparisons)
        note = "the recording begins in the middle of a training: how far the weights were apart is given"
        return {each.label: note for each in given}

    def _states_at_start(self) -> Answer:
        """Look for states that were loaded wrongly: of another rank, or masters that are not the weights."""
        table = self.before[0]
        findings, margins = [], {}
        found: dict[str, list[Explanation]] = {}
        kept: dict[str, list[str]] = {}
        for name in dict.fromkeys(key[1] for key in table if key[0] in ("state", "master")):
            margins[f"state of {name}"] = 0.0
            label_a, label_e = self.comparer.readings.get(name, ("", ""))
            expected = (
                repeated_state(self.before[1], self.expected, name, label_e),
                stale_masters(self.before[1], name, label_e),
            )
            known = {each.cause for each in expected if each is not None}
            for explanation in (repeated_state(table, self.actual, name, label_a), stale_masters(table, name, label_a)):
                if explanation is not None and explanation.cause not in known:
                    found.setdefault(explanation.cause.slug, []).append(explanation)
                    kept.setdefault(explanation.cause.slug, []).append(name)
        for slug, explanations in found.items():
            first, *others = kept[slug]
            ranks = sorted(
                {int(rank) for each in explanations for rank in each.evidence.get("state_of_rank", {})}
            ) or list(self.actual.members)
            where = {"phase": "start", "parameter": first, "ranks": ranks}
            evidence = {"also": others, "first_of": len(others) + 1}
            counted = ("parameter", "has a wrong state", "have a wrong state")
            findings.append(exact_finding(STATES, where, len(others) + 1, counted, explanations[0], evidence))
        return Answer(STATES, -1, margins, tuple(findings))

    # ---- steps

    def compare_steps(self) -> None:
        if not self.comparer.readings:
            self._leave_out_steps(self._no_common_names())
            return
        if any(answer.findings for answer in self.answers):
            self._leave_out_steps("the runs already differ before the first step, so later differences only follow")
            return
        if self.too_far_apart:
            self._leave_out_steps(self.too_far_apart)
            return
        self._note_unshared_steps()
        for step in aligned_steps(self.actual, self.expected):
            self.num_steps += 1
            reason = self._compare_step(step)
            if reason:
                self._leave_out_steps(reason, after=step.number)
                return
        self._compare_left_over()

    def _compare_step(self, step: AlignedStep) -> str:
        """Compare one step; return why later ones mean nothing, or an empty text."""
        number = step.number
        taken = steps_were_taken(self.comparer, step.actual, step.expected, number)
        if taken.findings:
            self._add([batches_agree(self.actual, step), taken])
            return f"step {number} already differs, so differences in later steps would only follow from it"
        context = self._context(step)
        batches = batches_agree(self.actual, step)
        if step.note:
            self.not_compared[f"step {number}" if step.shared is None else f"parameters of step {number}"] = step.note
        self.picture.add_losses(step)
        if step.shared is None:
            slices = slices_agree(self.actual, step, self.expected)
            self._add([batches, *([slices] if slices.findings else [])])
            unknown = unknown_slices(step, self.actual, self.expected)
            if unknown:
                self.not_compared[f"step {number}"] = unknown
            return f"the runs were given different samples in step {number}, and are different from there on"
        if not context.is_update_judged and (reason := self._apart_before(context)):
            self.not_compared[f"step {number}"] = reason
            return reason
        answers = [batches, *self._answers(context)]
        if not any(record.has_update for record in (*step.actual.values(), *step.expected.values())):
            answers = list(map(_without_unmeasured, answers))
        self._add(self._in_light_of_bits(context, answers))
        if any(answer.findings for answer in self.answers):
            return f"step {number} already differs, so differences in later steps would only follow from it"
        self.last_number = number
        self.before = (
            {**context.around.actual_before, **context.around.actual_after},
            {**context.around.expected_before, **context.around.expected_after},
        )
        if not step.shared.is_whole_step and step.expected and any(each.has_update for each in step.actual.values()):
            return f"the parameters were trained on different samples in step {number}, and are different from there on"
        return ""

    def _context(self, step: AlignedStep) -> StepContext:
        actual, expected = (
            self.comparer.table(run, {rank: record.tensors for rank, record in steps.items()})
            for run, steps in ((self.actual, step.actual), (self.expected, step.expected))
        )
        self.comparer.eps = (lowest_epsilon(step.actual), lowest_epsilon(step.expected))
        is_next = step.number == self.last_number + 1
        before = self.before if is_next else ({}, {})
        after = [
            {key: records for key, records in table.items() if key[0] in ("weight", "buffer", "master", "state")}
            for table in (actual, expected)
        ]
        around = BeforeAndAfter(before[0], after[0], before[1], after[1])
        noise = noise_of_weights(self.comparer, *before, self.scale)
        context = StepContext(self.comparer, step, actual, expected, around, self.measured, self.scale, is_next, noise)
        if not is_next:
            self.scale = max(self.scale, self._scale_of_given(context))
            self.comparer.given |= self._biases_given(context)
            context = replace(context, scale=self.scale)
        return replace(context, adds_up=replicas_added_up(context))

    def _apart_before(self, context: StepContext) -> str:
        """Return why a step after others that were not recorded is not compared: its weights are too far apart.

        Where rounding cannot have moved them so far, that is a finding.
        """
        comparisons = self._weights_after(context)
        reason = too_far_apart(comparisons, max(self.comparer.eps))
        parted = parted_unseen(comparisons) if reason else []
        if parted:
            steps = f"steps=range({self.last_number + 1}, {context.number + 1})"
            note = f"the runs part in a step that was not recorded, or in this one: record them again with {steps}"
            findings = [
                finding_at(UPDATES, context.number, each, None, self.measured, evidence={"note": note})
                for each in parted
            ]
            self._add([Answer.of(UPDATES, context.number, parted, joined(findings))])
        elif reason:
            self.notes.append(f"step {context.number} and later ones are not compared: {reason}")
        return reason

    def _weights_after(self, context: StepContext) -> list[Comparison]:
        around = context.around
        compared = self.comparer.stored(around.actual_after, around.expected_after, ("weight",))
        self.comparer.not_compared = {}
        return compared

    def _biases_given(self, context: StepContext) -> dict[str, float]:
        """Return how far biases may be apart before a step that follows others which were not recorded."""
        after = self._weights_after(context)
        return {each.name: each.error + (each.allowed or 0.0) for each in after if each.name.endswith("bias")}

    def _scale_of_given(self, context: StepContext) -> float:
        """Return how far the weights are apart, in units of what rounding moved them by, after steps not recorded."""
        comparisons = self._weights_after(context)
        scales = [
            each.error / (each.allowed or each.error)
            for each in comparisons
            if each.error and not each.name.endswith("bias")
        ]
        return max(1.0, *scales, 1.0)

    def _answers(self, context: StepContext) -> Iterator[Answer]:
        number = context.number
        outputs = outputs_match(context)
        if outputs.findings and drew_other_random_numbers(context.step, self.actual, self.expected):
            reason = (
                "the runs drew other random numbers in this step (dropout), so outputs are not the same: switch "
                "dropout off in both, or give both the same seeds and the same samples in each call"
            )
            yield Answer(OUTPUTS, number, not_compared={"outputs": reason, "gradients": reason})
            return
        yield from self._judged_weights(outputs)
        gradients = gradients_match(context)
        is_loss_wrong = gradients.findings and not outputs.findings and self.comparer.doubtful
        yield doubtful_losses(context, outputs) if is_loss_wrong else outputs
        yield gradients
        if context.step.shared is None or not context.step.shared.is_whole_step:
            return
        if gradients.is_given:
            self.scale = max(self.scale, self._scale_of_given(context))
            context = replace(context, scale=self.scale, is_update_judged=False)
        yield norm_matches(context, gradients)
        of_step = [updates_match(context, gradients), states_match(context, gradients)]
        if not any(answer.findings for answer in of_step):
            of_step.append(weights_are_masters(context))
        yield from of_step
        everything = bool(outputs.findings) or any("module" in finding.where for finding in gradients.findings)
        wrong = None if everything else names_in(answer.findings for answer in (gradients, *of_step))
        expected = replicas_agree(self.expected, context.around.expected_after, context.around.expected_before, number)
        yield replicas_agree(
            self.actual, context.around.actual_after, context.around.actual_before, number, expected, wrong
        )

    def _judged_weights(self, outputs: Answer) -> Iterator[Answer]:
        """Yield the doubtful weights of the module whose output is the first wrong one; the others are right."""
        places = {finding.where["module"] for finding in outputs.findings}
        wrong = [each for each in self.doubtful_weights if each.where["parameter"].rpartition(".")[0] in places]
        if outputs.margins:
            self.doubtful_weights = []
        if wrong:
            yield Answer(WEIGHTS, -1, findings=tuple(joined(wrong)))

    def _in_light_of_bits(self, context: StepContext, answers: Sequence[Answer]) -> list[Answer]:
        """Name the first place where two runs of everything the same have other bits."""
        answers = list(answers)
        if not self.is_same_to_the_bit:
            return answers
        step = context.step
        if not same_inputs(step):
            self.is_same_to_the_bit = False
            return answers
        found = first_other_bits(step)
        if found is None:
            return answers
        self.is_same_to_the_bit = False
        key, ranks = found
        place = key[1] or "the model"
        explanation = Explanation(Cause.NONDETERMINISM)
        judged = [each for answer in answers for each in answer.comparisons if each.allowed is not None]
        first_findings = [finding for answer in answers for finding in answer.findings]
        if key[0] not in ("output", "output_gradient"):
            return answers
        if judged and not first_findings:
            self.notes.append(
                f"{label_of(key)} in step {step.number} is the first tensor whose bits differ, although both runs "
                f"have the same versions, topology, weights, inputs and generators: {place} is not deterministic. "
                "What differs is no more than rounding."
            )
            return answers
        others = sum(
            1
            for rank in step.actual
            for actual in step.actual[rank].tensors
            if any(e.key == actual.key and e.digest != actual.digest for e in step.expected[rank].tensors)
        )
        where = {
            "phase": "forward" if key[0] == "output" else "backward",
            "step": step.number,
            "module": key[1],
            "field": label_of(key),
            "ranks": ranks,
        }
        worst = next(
            (each.relative for answer in answers for each in answer.comparisons if each.key[:2] == key[:2]), None
        )
        check = OUTPUTS if key[0] == "output" else GRADIENTS
        error = {} if worst is None else {"relative_error": worst}
        finding = exact_finding(check, where, others, ("tensor", "differs", "differ"), explanation, error)
        return [
            replace(answer, findings=(finding,) if answer.check == check else ())
            if answer.check != REPLICAS
            else answer
            for answer in answers
        ]

    # ---- what only one run has

    def _note_unshared_steps(self) -> None:
        numbers_a, numbers_e = set(self.actual.numbers), set(self.expected.numbers)
        for numbers, other in ((numbers_a - numbers_e, "expected"), (numbers_e - numbers_a, "actual")):
            for number in sorted(numbers):
                self.not_compared[f"step {number}"] = f"the {other} run has no such step"

    def _no_common_names(self) -> str:
        names = [
            next((record.name for record in run.first.initial if record.kind == "weight"), "none")
            for run in (self.actual, self.expected)
        ]
        return (
            f"no parameter has the same name in both runs (the first ones are {names[0]} and {names[1]}): give a "
            "pattern with --map 'REGEX=REPLACEMENT', or names= of compare_traces"
        )

    def _leave_out_steps(self, reason: str, after: int = -2) -> None:
        for number in self.expected.numbers:
            if number > after and number in self.actual.numbers:
                self.not_compared[f"step {number}"] = reason

    def _compare_left_over(self) -> None:
        """Ask whether ranks ended their recording with fewer steps than others took."""
        complete = [rank for rank in self.actual.members if self.actual.ranks[rank].is_complete]
        taken = {rank: self.actual.ranks[rank].num_steps for rank in complete}
        if len(set(taken.values())) < 2:
            return
        most = max(taken.values())
        fewer = [rank for rank, number in taken.items() if number < most]
        number = min(taken.values())
        steps = self.actual.steps(number)
        if number in self.expected.numbers and number in self.actual.numbers and steps:
            return  # compared as a step
        where = {"phase": "update", "step": number, "ranks": fewer}
        names = list(dict.fromkeys(record.name for record in self.actual.first.initial if record.kind == "weight"))
        if names:
            where["parameter"] = names[0]
        evidence = {"steps_taken": {str(rank): count for rank, count in taken.items()}, "also": names[1:]}
        explanation = Explanation(Cause.STALE_WEIGHT, evidence={"note": "these ranks took fewer steps than others"})
        finding = exact_finding(
            UPDATES, where, len(fewer), ("rank", "took fewer steps", "took fewer steps"), explanation, evidence
        )
        self._add([Answer(UPDATES, number, findings=(finding,))])

    # ---- the verdict

    def _add(self, answers: Sequence[Answer]) -> None:
        answers = list(answers)
        first = next((answer.check for answer in answers if answer.findings), None)
        for answer in answers:
            findings = tuple(
                _following(finding, first) if finding.cause is None and answer.check != first else finding
                for finding in answer.findings
            )
            self.picture.add_answers([answer])
            self.margins = worst_by_module(self.margins, answer.by_module())
            # Sketches are not kept: a run may have thousands of steps.
            kept = tuple(each for each in answer.comparisons if each.allowed is None and each.error)
            errors = tuple(replace_sketches(each) for each in kept)
            self.answers.append(replace(answer, findings=findings, comparisons=errors))

    def verdict(self) -> Verdict:
        actual, expected = self.actual, self.expected
        again = compare_command(actual.path, expected.path, self.comparer.names.texts)
        findings = tuple(replace(finding, again=again) for answer in self.answers for finding in answer.findings)
        not_compared = dict(self.not_compared)
        for answer in self.answers:
            moment = "" if answer.step < 0 else f"step {answer.step}: "
            not_compared |= {f"{answer.check}: {moment}{name}": why for name, why in answer.not_compared.items()}
        unmeasured = [each for answer in self.answers for each in answer.comparisons]
        num_unmeasured = len(unmeasured)
        num_compared = sum(len(answer.margins) for answer in self.answers)
        messages = list(self.notes)
        name: Any = "failed" if findings else "passed"
        num_tensors = sum(
            len(answer.margins) for answer in self.answers if answer.check in _CALIBRATED and answer.step >= 0
        )
        if num_unmeasured:
            reason = "no replay measured what rounding does to it"
            not_compared[f"{num_unmeasured} tensors"] = reason
            messages.append(_without_measure(unmeasured, self._run_to_measure(), self._why_not_measured()))
            name = "failed" if findings else "skipped"
        elif not findings and not num_tensors:
            name = "skipped"
            reasons = list(dict.fromkeys(self.not_compared.values())) or list(dict.fromkeys(not_compared.values()))
            messages.append("\n".join(reasons[:3]) or "the runs have no step in common")
        coverage = Coverage(
            num_compared, num_compared + len(not_compared) - (1 if num_unmeasured else 0) + num_unmeasured, not_compared
        )
        return Verdict(
            name,
            self._subject(),
            actual.first.versions,
            findings=findings,
            checks=self._results(),
            coverage=coverage,
            message="\n".join(messages) or None,
            modules=modules_of(self.margins),
        )

    def _why_not_measured(self) -> str:
        """Return why replays of the run that needs them measured nothing; empty where there were none."""
        lowest = max(self.comparer.eps)
        sides = zip((self.actual, self.expected), self.comparer.eps, strict=True)
        ranks = [rank for run, eps in sides if eps == lowest for rank in run.ranks.values()]
        not_recorded = [each for rank in ranks for each in rank.not_recorded.items()]
        reasons = [why for name, why in not_recorded if name.startswith(("replays", "updates"))]
        if not reasons and any(rank.replays for rank in ranks):
            return "Replays have measured what rounding may do to other tensors alone"
        return reasons[0] if reasons else ""

    def _run_to_measure(self) -> str:
        """Return which run needs replays: the one that computes in the lower dtype."""
        actual, expected = self.comparer.eps
        if actual == expected:
            return "one of the two runs"
        return f"the {'actual' if actual > expected else 'expected'} run, which computes in the lower precision,"

    def _subject(self) -> dict[str, Any]:
        actual, expected = self.actual, self.expected
        differing = {
            package: f"{version} (expected run: {expected.first.versions[package]})"
            for package, version in actual.first.versions.items()
            if expected.first.versions.get(package, version) != version
        }
        return {
            "subject": actual.path,
            "tp": actual.tp,
            "dp": actual.first.topology.dp,
            "dtype": actual.first.dtype,
            "steps": self.num_steps,
            "expected": expected.path,
            "expected_tp": expected.tp,
            "expected_dp": expected.first.topology.dp,
            "expected_dtype": expected.first.dtype,
            "replays": self.measured.replays,
            **({"cp": actual.cp, "slices": actual.first.order} if actual.cp > 1 else {}),
            **({"expected_cp": expected.cp, "expected_slices": expected.first.order} if expected.cp > 1 else {}),
            **({"versions_differ": differing} if differing else {}),
        }

    def _results(self) -> tuple[CheckResult, ...]:
        results: dict[str, CheckResult] = {}
        for answer in self.answers:
            known = results.get(answer.check, CheckResult(answer.check, 0, 0.0))
            compared = known.compared + len(answer.margins)
            worst = max(answer.margins, key=answer.margins.__getitem__, default=None)
            if worst is not None and answer.margins[worst] > known.worst_margin:
                at = worst if answer.step < 0 else f"{worst}, step {answer.step}"
                results[answer.check] = CheckResult(answer.check, compared, answer.margins[worst], at)
            else:
                results[answer.check] = replace(known, compared=compared)
        return tuple(results.values())


def _following(finding: Finding, first: str | None) -> Finding:
    """Return a finding without a cause as one that follows from the first check's, and advises nothing more."""
    evidence = {name: value for name, value in finding.evidence.items() if name != "note"}
    return replace(finding, evidence={**evidence, "follows_from": first})


def may_lie_in_another_order(comparison: Comparison, explanation: Explanation | None) -> bool:
    """Return whether a weight's cut was guessed from shapes, and only the order of its elements may be another one.

    Fused layers (Q, K and V; gate and up) are cut block by block. Whether that is a mistake, the outputs tell.
    """
    actual, expected = comparison.actual, comparison.expected
    is_guess = "dim" in actual.label or "dim" in expected.label
    is_about_order = explanation is None or explanation.cause in CAUSES_OF_ORDER
    return is_guess and is_about_order and abs(actual.norm - expected.norm) <= (comparison.allowed or 0.0)


def _without_unmeasured(answer: Answer) -> Answer:
    """Return the answer about calls that no step followed: replays measure steps, so they are judged where they can."""
    unmeasured = [each for each in answer.comparisons if each.allowed is None]
    if not unmeasured:
        return answer
    reason = "no optimizer step followed these calls, so no replay measured what rounding does to them"
    measured = tuple(each for each in answer.comparisons if each.allowed is not None)
    not_compared = {**answer.not_compared, **{each.label: reason for each in unmeasured if each.error}}
    return replace(answer, comparisons=measured, not_compared=not_compared)


def lowest_epsilon(steps: Mapping[int, StepRecord]) -> float:
    """Return the machine epsilon of the lowest dtype that a step was computed in, as under autocast."""
    step = next(iter(steps.values()))
    dtypes = {record.dtype for record in step.tensors if record.kind in ("output", "weight")} | {step.autocast}
    return max(epsilon(dtype) for dtype in dtypes)


def replace_sketches(comparison: Comparison) -> Comparison:
    """Return the comparison without its ranks' parts, which are large."""
    return replace(
        comparison,
        actual=replace(comparison.actual, parts={}),
        expected=replace(comparison.expected, parts={}),
    )


def _in_units_of_rounding(comparison: Comparison) -> float:
    """Return how far weights are apart, in units of what a replay multiplies modules' outputs by."""
    eps = max(epsilon(comparison.actual.dtype), epsilon(comparison.expected.dtype))
    return comparison.relative / eps * 3**0.5 if eps else 1.0


def _without_measure(comparisons: Sequence[Comparison], which: str, why: str = "") -> str:
    """Return what is to be said where no replay measured rounding: what to add, and which modules add most to it.

    Args:
        which: The run that needs replays.
        why: Why replays that were made have measured nothing.
    """
    text = (
        f"{why}. What was not measured is listed as errors, not findings."
        if why
        else f"Nothing measured what rounding may do: record {which} again with replays, as in "
        "tpcheck.record(model, path, replays=2). Until then these are errors, not findings."
    )
    added = added_errors(comparisons)
    lines = [
        f"  {label}: relative error {error:.1e}, {factor:.1f} times the largest before it"
        for label, error, factor in added
    ]
    return "\n".join([text, *(["The outputs and gradients that add most:"] if lines else []), *lines])


def added_errors(comparisons: Sequence[Comparison]) -> list[tuple[str, float, float]]:
    """Return the tensors that add most to the error: label, relative error, and that over the largest before it."""
    found, before = [], 0.0
    for comparison in comparisons:
        error = comparison.relative
        if error > before > 0 or (error and not before):
            found.append((comparison.label, error, error / before if before else 1.0))
        before = max(before, error)
    return sorted(found, key=lambda each: -each[2])[:_MOST_ERRORS_LISTED]
