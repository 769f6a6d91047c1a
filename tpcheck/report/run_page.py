"""The page about two compared runs: errors along the depth of the model, tiles of the worst tensors, findings.

It needs no other file and no network. Its size is bounded whatever the size of the runs: it says what it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from tpcheck.core.findings import Finding, Verdict
from tpcheck.report import words
from tpcheck.report.charts import (
    LogScale,
    Mark,
    Tick,
    legend_keys,
    scatter,
    shortened,
)
from tpcheck.report.error_maps import map_of_tiles
from tpcheck.report.findings import first_finding, is_consequence
from tpcheck.report.json_values import plain_json
from tpcheck.report.page import finding_text, first_place, frame
from tpcheck.report.run_picture import PicturePhase, RunComparison, ShardOfTiles, TensorPoint, TileMap
from tpcheck.report.table import Table
from tpcheck.report.templates import render

# ---- what is drawn

MOST_MARKS = 400  # in one chart: of more neighbours the worst is drawn
MOST_STEPS = 24  # drawn tensor by tensor
MOST_CHARACTERS = 3_000_000  # of all steps' charts; with twelve heat maps and the rest a page stays below 5 MB
_MOST_OPENED, _MOST_FINDINGS = 5, 35
_MOST_WORST = 12  # tensors in the table of a step

PHASES: Mapping[PicturePhase, str] = {
    "start": "Weights before the first step",
    "forward": "Forward: outputs of modules",
    "backward": "Backward: gradients of outputs",
    "gradient": "Gradients of parameters, as the optimizer gets them",
    "update": "Weights after the step",
    "state": "Optimizer state after the step",
}
_SHORT: Mapping[PicturePhase, str] = {
    "start": "start",
    "forward": "forward",
    "backward": "backward",
    "gradient": "gradients",
    "update": "weights",
    "state": "optimizer state",
}
_LAYER = re.compile(r"^(.*?[^.]*\.\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class StepDrawing:
    """One step of the page: its charts, and its worst tensors as a table.

    Attributes:
        number: Of the step; -1 before the first.
        heading: Such as `Step 2: loss 3.51, expected 3.52`.
        charts: Title, remark and SVG of each phase.
        worst: Rows of the table: tensor, phase, error, allowed, margin.
        is_first_wrong: Whether the first finding is of this step.
    """

    number: int
    heading: str
    charts: tuple[tuple[str, str, str], ...]
    worst: tuple[tuple[str, str, str, str, str], ...]
    is_first_wrong: bool

    @property
    def characters(self) -> int:
        return sum(len(svg) for _, _, svg in self.charts)


def run_page(verdict: Verdict, picture: RunComparison, checks: Table) -> str:
    """Return the page of a comparison."""
    first = first_finding(verdict.findings)
    steps, left_out = _drawn_steps(picture, first)
    shown = [finding for finding in verdict.findings if not is_consequence(finding)][:_MOST_OPENED]
    shown = shown or list(verdict.findings[:1])
    others = [finding for finding in verdict.findings if not any(finding is each for each in shown)]
    tile_maps = [map_of_tiles(tile_map) for tile_map in picture.tile_maps]
    return render(
        "run_page.html",
        **frame(verdict, checks),
        title=shortened(f"{verdict.verdict}: {verdict.subject.get('subject')}, {_expected(verdict)}", 300),
        summary=_summary(verdict, picture, first),
        runs=_runs(verdict.subject),
        overview=_overview(picture),
        steps=steps,
        keys=legend_keys(),
        selected=next((step.number for step in steps if step.is_first_wrong), steps[-1].number if steps else 0),
        left_out=left_out,
        tile_maps=tile_maps,
        findings=[finding_text(finding, verdict) for finding in shown],
        other_findings=[finding_text(finding, verdict) for finding in others[:_MOST_FINDINGS]],
        more_findings=max(0, len(others) - _MOST_FINDINGS),
    )


def picture_json(verdict: Verdict, picture: RunComparison) -> dict[str, Any]:
    """Return what the page draws as plain JSON values: all losses and tile maps, and the points of the drawn steps."""
    steps, _ = _drawn_steps(picture, first_finding(verdict.findings))
    drawn = {step.number for step in steps}
    of_steps = [[point for point in picture.points if point.step == number] for number in sorted(drawn)]
    points = [point for of_step in of_steps for of_phase in _by_phase(of_step) for point in thinned(of_phase)]
    return {
        "points_total": len(picture.points),
        "points": [_plain(point) for point in points],
        "tile_maps": [
            {**_plain(tile_map), "shards": [_plain(shard) for shard in tile_map.shards]}
            for tile_map in picture.tile_maps
        ],
        "losses": plain_json(picture.losses),
    }


def _plain(record: TensorPoint | TileMap | ShardOfTiles) -> dict[str, Any]:
    return {name: plain_json(getattr(record, name)) for name in record.__slots__}


def _expected(verdict: Verdict) -> str:
    return f"against {verdict.subject['expected']}" if verdict.subject.get("expected") else "two runs"


def _runs(subject: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what is known of both runs: a label, the actual run's, the expected one's."""
    rows = [("trace", "subject", "expected"), ("tensor-parallel ranks", "tp", "expected_tp")]
    rows += [("data-parallel ranks", "dp", "expected_dp"), ("dtype", "dtype", "expected_dtype")]
    shown = [
        (label, shortened(str(subject.get(actual, "")), 300), shortened(str(subject.get(expected, "")), 300))
        for label, actual, expected in rows
    ]
    for package, version in (subject.get("versions_differ") or {}).items():
        actual, _, expected = str(version).partition(" (expected run: ")
        shown.append((shortened(str(package)), shortened(actual), shortened(expected.removesuffix(")"))))
    return [row for row in shown if row[1] or row[2]]


def _summary(verdict: Verdict, picture: RunComparison, first: Finding | None) -> str:
    steps, replays = verdict.subject.get("steps"), verdict.subject.get("replays")
    counted = f"{words.pluralize(steps, 'step')} compared" if isinstance(steps, int) else ""
    measured = f"what rounding does was measured by {words.pluralize(replays, 'replay')}" if replays else ""
    of_run = "; ".join(part for part in (counted, measured) if part)
    if first is not None:
        head = first_place(first)
    elif verdict.verdict == "passed":
        worst = max((_margin(point) for point in picture.points if point.relative_allowed is not None), default=0.0)
        head = f"Nothing is further off than rounding explains: the worst margin is {words.margin(worst)}"
    else:
        head = {"skipped": "Nothing was decided", "error": "The comparison ended with an error"}.get(
            verdict.verdict, ""
        )
    return ". ".join(part for part in (head, f"{of_run[:1].upper()}{of_run[1:]}" if of_run else "") if part) + "."


# ---- steps


def _drawn_steps(picture: RunComparison, first: Finding | None) -> tuple[list[StepDrawing], str]:
    """Return the steps that are drawn in their order, and a sentence on those that are not."""
    chosen = _chosen_steps(picture, first)
    scales = _scales([point for _, points in chosen for point in points])
    losses = {step: (actual, expected) for step, actual, expected in picture.losses}
    drawn: list[StepDrawing] = []
    characters = 0
    for number, points in chosen:
        step = _drawn_step(number, points, scales, losses.get(number), first)
        if drawn and characters + step.characters > MOST_CHARACTERS:
            break
        characters += step.characters
        drawn.append(step)
    total = len({point.step for point in picture.points})
    left_out = ""
    if len(drawn) < total:
        left_out = (
            f"{len(drawn)} of {total} steps are drawn tensor by tensor: the first wrong one, the first, the last, and "
            "those with the largest errors. The chart above has all of them."
        )
    return sorted(drawn, key=lambda step: step.number), left_out


def _chosen_steps(picture: RunComparison, first: Finding | None) -> list[tuple[int, list[TensorPoint]]]:
    """Return the steps that are worth drawing with their points, the most telling first."""
    by_step: dict[int, list[TensorPoint]] = {}
    for point in picture.points:
        by_step.setdefault(point.step, []).append(point)
    if not by_step:
        return []
    wrong_step = None if first is None else first.where.get("step", -1)
    ends = (min(by_step), min((step for step in by_step if step >= 0), default=-1), max(by_step))

    def importance(step: int) -> tuple[bool, bool, bool, tuple[bool, float, float]]:
        points = by_step[step]
        return step == wrong_step, any(point.is_wrong for point in points), step in ends, max(map(_severity, points))

    return [(step, by_step[step]) for step in sorted(by_step, key=importance, reverse=True)[:MOST_STEPS]]


def _by_phase(points: Sequence[TensorPoint]) -> Iterator[list[TensorPoint]]:
    for phase in PHASES:
        of_phase = [point for point in points if point.phase == phase]
        if of_phase:
            yield of_phase


def _drawn_step(
    number: int,
    points: Sequence[TensorPoint],
    scales: Mapping[PicturePhase, LogScale],
    losses: tuple[float, float] | None,
    first: Finding | None,
) -> StepDrawing:
    is_of_step = first is not None and first.where.get("step", -1) == number
    charts = tuple(
        _chart(of_phase, scales[of_phase[0].phase], first if is_of_step else None) for of_phase in _by_phase(points)
    )
    worst = sorted(points, key=_severity, reverse=True)[:_MOST_WORST]
    rows = tuple(
        (
            shortened(point.label),
            _SHORT[point.phase],
            words.error(point.relative_error),
            "not measured" if point.relative_allowed is None else words.error(point.relative_allowed),
            "" if point.relative_allowed is None else words.margin(_margin(point)),
        )
        for point in worst
    )
    loss = f": loss {losses[0]:.6g}, expected {losses[1]:.6g}" if losses else ""
    heading = "Before the first step" if number < 0 else f"Step {number}{loss}"
    return StepDrawing(number, heading, charts, rows, is_of_step)


def _chart(points: Sequence[TensorPoint], scale: LogScale, first: Finding | None) -> tuple[str, str, str]:
    """Return the title, the remark and the SVG of one phase."""
    pointed = next((point for point in points if first is not None and _is_at(point, first)), None)
    drawn = thinned(points, pointed)
    marks = [
        Mark(index, point.relative_error, _title(point), _look(point, pointed), point.relative_allowed)
        for index, point in enumerate(drawn)
    ]
    counted = words.pluralize(len(points), "tensor")
    num_wrong = sum(point.is_wrong or point is pointed for point in points)
    remark = f"{counted}, {num_wrong} wrong" if num_wrong else counted
    if len(drawn) < len(points):
        remark += f"; {len(drawn)} drawn, the worst of each {-(-len(points) // MOST_MARKS)} neighbours"
    if pointed is not None and not pointed.is_wrong and first is not None and first.allowed:
        remark += "; the first wrong one by what it adds to the error of its inputs"
    phase = PHASES[points[0].phase]
    worst = max(points, key=_severity)
    text = f"{phase}: {remark}. Largest: {_title(worst)}."
    if pointed is not None:
        text += f" First wrong: {_title(pointed)}."
    svg = scatter(
        marks,
        scale,
        length=len(marks),
        ticks=list(_layer_ticks(drawn)),
        text=text,
        pointed=None if pointed is None else (drawn.index(pointed), pointed.name),
    )
    return phase, remark, svg


def thinned(points: Sequence[TensorPoint], kept: TensorPoint | None = None) -> list[TensorPoint]:
    """Return the points, or of each few neighbours the worst where there are more than a chart can show."""
    size = -(-len(points) // MOST_MARKS)
    if size <= 1:
        return list(points)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [kept if kept is not None and kept in group else max(group, key=_severity) for group in groups]


def _look(point: TensorPoint, pointed: TensorPoint | None) -> str:
    if point.is_wrong or point is pointed:
        return "wrong"
    return "within" if point.relative_allowed is not None or point.relative_error == 0 else "unmeasured"


def _is_at(point: TensorPoint, finding: Finding) -> bool:
    """Return whether a finding is about this tensor."""
    where = finding.where
    parameter, module, phase = where.get("parameter"), where.get("module"), where.get("phase")
    name = module if parameter is None else parameter
    phases = {("backward", True): ("gradient",), ("update", True): ("update", "state")}
    is_of_phase = point.phase in phases.get((str(phase), parameter is not None), (phase,))
    # A buffer's finding has its module.
    return is_of_phase and (point.name == name or point.label == where.get("field"))


def _title(point: TensorPoint) -> str:
    text = f"{shortened(point.label)}: error {words.error(point.relative_error)}"
    if point.relative_allowed is None:
        return f"{text}, allowed: not measured" if point.relative_error else f"{text}, equal"
    return f"{text}, allowed {words.error(point.relative_allowed)}, margin {words.margin(_margin(point))}"


def _margin(point: TensorPoint) -> float:
    if point.relative_error == 0 or point.relative_allowed is None:
        return 0.0
    return point.relative_error / point.relative_allowed if point.relative_allowed else inf


def _severity(point: TensorPoint) -> tuple[bool, float, float]:
    """Return how bad an error is, for sorting; NaN is as bad as an infinity."""
    error = point.relative_error if isfinite(point.relative_error) else inf
    margin = _margin(point)
    return point.is_wrong, margin if margin == margin else inf, error


def _scales(points: Iterable[TensorPoint]) -> dict[PicturePhase, LogScale]:
    """Return the scale of each phase, the same in all steps."""
    by_phase: dict[PicturePhase, list[TensorPoint]] = {}
    for point in points:
        by_phase.setdefault(point.phase, []).append(point)
    return {
        phase: LogScale.of([p.relative_error for p in listed], [p.relative_allowed or 0.0 for p in listed])
        for phase, listed in by_phase.items()
    }


def _layer_ticks(points: Sequence[TensorPoint]) -> Iterator[Tick]:
    """Yield where a layer begins, by the first number in the names: `layers.0`, then `1`, `2`; and other names."""
    before, stem_before = "", ""
    for index, point in enumerate(points):
        found = _LAYER.match(point.name)
        name = found.group(1) if found else point.name
        if name == before:
            continue
        before = name
        if found is None:
            yield Tick(index, ".".join(name.removesuffix(".weight").split(".")[-2:]), is_main=False)
            continue
        stem, _, number = name.rpartition(".")
        yield Tick(index, number if stem == stem_before else ".".join(name.split(".")[-2:]))
        stem_before = stem


# ---- all steps at once


def _overview(picture: RunComparison) -> tuple[str, list[tuple[str, str]]] | None:
    """Return a chart of the worst tensor of each step and phase, and its legend; None for a single step."""
    by_phase_and_step: dict[tuple[PicturePhase, int], list[TensorPoint]] = {}
    for point in picture.points:
        if point.step >= 0:
            by_phase_and_step.setdefault((point.phase, point.step), []).append(point)
    worst = {key: max(points, key=_severity) for key, points in by_phase_and_step.items()}
    steps = sorted({step for _, step in worst})
    if len(steps) < 2:
        return None
    is_measured = any(point.relative_allowed is not None for point in worst.values())
    of_value = _margin if is_measured else _error
    size = -(-len(steps) // (MOST_MARKS // 2))
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]
    marks = []
    legend = []
    for number, phase in enumerate(_SHORT):
        listed = [[worst[phase, step] for step in group if (phase, step) in worst] for group in groups]
        if not any(listed):
            continue
        legend.append((f"series-{number}", _SHORT[phase]))
        for index, points in enumerate(listed):
            if points:
                point = max(points, key=_severity)
                title = f"step {point.step}, {_SHORT[phase]}: {_title(point)}"
                marks.append(Mark(index, of_value(point), title, f"series-{number}"))
    ticks = [Tick(index, str(group[0])) for index, group in enumerate(groups)]
    what = "error divided by the allowed one" if is_measured else "relative error"
    worst_mark = max(marks, key=lambda mark: mark.value)
    svg = scatter(
        marks,
        LogScale.of([mark.value for mark in marks], [1.0] if is_measured else []),
        length=len(groups),
        ticks=ticks,
        text=f"The largest {what} of each of {len(steps)} steps, by phase. The largest of all: {worst_mark.title}.",
        line_at=1.0 if is_measured else None,
    )
    return svg, [("", f"for each step the largest {what}"), *legend]


def _error(point: TensorPoint) -> float:
    return point.relative_error
