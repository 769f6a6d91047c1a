"""Many verifications as one matrix: its cells, the file of their verdicts, and the table beside the known bugs.

Loads no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf
from pathlib import Path
from textwrap import shorten
from typing import Any

from tpcheck.core.causes import Cause
from tpcheck.core.environment import installed_versions, package_versions
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import CheckResult, Coverage, Finding, ModuleMargins, Verdict
from tpcheck.core.topology import Topology
from tpcheck.lab.known import JudgedVerdict
from tpcheck.model.options import DEFAULTS, RunOptions, require_valid_options
from tpcheck.model.targets import is_family, require_backend_for, resolve
from tpcheck.model.user_code import is_user_code
from tpcheck.report import words
from tpcheck.report.findings import place
from tpcheck.report.json_values import SCHEMA, json_text, verdict_json
from tpcheck.report.report import STYLES, as_junit, verdict_lines
from tpcheck.report.table import (
    Cell as TableCell,
)
from tpcheck.report.table import (
    Column,
    Outcome,
    Row,
    Table,
    markdown_text,
    table_lines,
    table_markdown,
    tables_html,
)
from tpcheck.report.words import Line, as_text, labelled, plain

_WORST_FIRST = ("failed", "error", "passed", "skipped")


def judged_json(judged: JudgedVerdict) -> str:
    """Return one verdict of a matrix as JSON, with its entry in the register of known bugs."""
    data = verdict_json(judged.verdict)
    if judged.standing:
        data["upstream"] = {"standing": judged.standing, "bug": judged.bug.name if judged.bug else None}
    return json_text(data, indent=1)


def whole_json(reports: Iterable[str], verdicts: Iterable[str], pending: int) -> str:
    """Return the text of a file of verdicts; `pending` counts those that are still missing."""
    reached = set(verdicts)
    worst = next((name for name in _WORST_FIRST if name in reached), "skipped")
    head = f'"schema": {SCHEMA},\n"verdict": "{worst}",\n"pending": {pending},\n'
    return "{\n" + head + '"reports": [\n' + ",\n".join(reports) + "\n]}\n"


def stored_verdicts(path: Path) -> list[Verdict]:
    """Return the verdicts in a file; none if the file does not exist or is no report."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [verdict_of(report) for report in data.get("reports", [data])]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []


def verdict_of(data: Mapping[str, Any]) -> Verdict:
    """Return the verdict of the data that `verdict_json` returned.

    Raises:
        KeyError: The data is no verdict.
    """
    return Verdict(
        verdict=data["verdict"],
        subject=data["subject"],
        environment=data["environment"],
        findings=tuple(_finding(finding) for finding in data["findings"]),
        checks=tuple(
            CheckResult(
                check["check"],
                check["compared"],
                _number(check["worst_margin"]),
                check["worst_at"],
                check.get("compared_only"),
            )
            for check in data["checks"]
        ),
        coverage=Coverage(*(data["coverage"][key] for key in ("compared", "total", "missed"))),
        seconds=data["seconds"],
        message=data["message"],
        notes=tuple(data.get("notes", ())),
        modules=_modules(data.get("margins", {})),
    )


def _modules(margins: Mapping[str, Mapping[str, float | None]]) -> tuple[ModuleMargins, ...]:
    """Return what `verdict_json` keeps; a file of an earlier version has none."""
    by_phase = [
        {name: _number(margin) for name, margin in margins.get(phase, {}).items()}
        for phase in ("forward", "backward", "weights")
    ]
    names = dict.fromkeys(name for of_phase in by_phase for name in of_phase)
    return tuple(ModuleMargins(name, *(of_phase.get(name) for of_phase in by_phase)) for name in names)


def _finding(data: Mapping[str, Any]) -> Finding:
    same = {name: data[name] for name in ("check", "where", "cause", "evidence", "again")}
    return Finding(observed=_number(data["observed"]), allowed=_number(data["allowed"]), **same)


def _number(value: float | None) -> float:
    return inf if value is None else value


@dataclass(frozen=True, slots=True)
class Cell:
    """One target under one choice of options.

    Attributes:
        family: The target as the user gave it; mostly a family.
        options: The options.
        of_target: What the subject says of a target that is no family.
    """

    family: str
    options: RunOptions = DEFAULTS
    of_target: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def subject(self) -> Mapping[str, Any]:
        """What the report of this cell says of the run."""
        return self.options.subject(self.family) if self.of_target is None else self.of_target


def combinations(
    common: RunOptions = DEFAULTS,
    *,
    backend: Sequence[str] = (str(DEFAULTS.backend),),
    tp: Sequence[int] = (DEFAULTS.topology.tp,),
    dp: Sequence[int] = (DEFAULTS.topology.dp,),
    zero: Sequence[int] = (DEFAULTS.zero_stage,),
    dtype: Sequence[str] = (DEFAULTS.dtype,),
    attention: Sequence[str | None] = (),
    experts: Sequence[str | None] = (),
) -> list[RunOptions]:
    """Return the options of every combination of these values, each once; the others are those of `common`.

    Raises:
        UsageError: A size is not a positive integer.
    """
    implementations = product(attention or (common.attention,), experts or (common.experts,))
    combined = product(backend, tp, dp, zero, dtype, implementations)
    return [
        replace(
            common,
            backend=name,
            topology=Topology(tp=tp_size, dp=dp_size),
            zero_stage=stage,
            dtype=precision,
            attention=of_attention,
            experts=of_experts,
        )
        for name, tp_size, dp_size, stage, precision, (of_attention, of_experts) in dict.fromkeys(combined)
    ]


def require_usable(combined: Sequence[RunOptions]) -> None:
    """Raise UsageError if no combination can be used."""
    refusals = [_refusal(options) for options in combined]
    if refusals[0] is not None and all(refusals):
        raise refusals[0]


def require_usable_values(combined: Sequence[RunOptions]) -> None:
    """Raise the UsageError of a value that no combination takes. What some of them take is skipped in the others."""
    refusals = [_refusal(options) for options in combined]
    refused_with: dict[tuple[str, str], list[UsageError | None]] = {}
    for options, refusal in zip(combined, refusals, strict=True):
        for name, value in options.keywords().items():
            is_refused = refusal is not None and refusal.name.partition("[")[0] == name
            refused_with.setdefault((name, repr(value)), []).append(refusal if is_refused else None)
    for errors in refused_with.values():
        if errors[0] is not None and all(errors):
            raise errors[0]
    require_usable(combined)


def _refusal(options: RunOptions) -> UsageError | None:
    try:
        require_valid_options(options)
    except UsageError as error:
        return error
    return None


def cells(families: Sequence[str], combined: Sequence[RunOptions]) -> tuple[Cell, ...]:
    """Return a cell for each target and each of these options, those of one target together.

    Raises:
        UsageError: There is no such folder or file.
    """
    return tuple(_cell(family, options) for family in dict.fromkeys(families) for options in combined)


def _cell(name: str, options: RunOptions) -> Cell:
    """Return the cell of a target; one that is no family is looked for before anything runs."""
    require_backend_for(name, options)
    return Cell(name, options) if is_family(name) else Cell(name, options, resolve(name, options).subject)


def versions(backend: str) -> dict[str, str]:
    """Return the versions that a run with this backend depends on, without importing it."""
    return package_versions() | installed_versions((backend, backend.partition("-")[0]))


def done_before(path: Path, wanted: Sequence[Cell]) -> dict[Cell, Verdict]:
    """Return the verdicts that a file of an earlier run holds of these cells, with the same options and versions.

    A function of the user's may have changed since, and what it imports: it is run again.
    """
    stored = {_key(verdict.subject): verdict for verdict in stored_verdicts(path)}
    keys = {cell: None if is_user_code(cell.family) else _key(cell.subject) for cell in wanted}
    found = {cell: stored[key] for cell, key in keys.items() if key is not None and key in stored}
    return {cell: verdict for cell, verdict in found.items() if _is_current(verdict, cell)}


def num_other_results(path: Path, cells: Sequence[Cell]) -> int:
    """Return how many results a file of a matrix holds that are of none of these cells; 0 for a file of one run."""
    try:
        if "reports" not in json.loads(path.read_text(encoding="utf-8")):
            return 0
    except (OSError, ValueError, TypeError):
        return 0
    keys = {_identity(cell.subject) for cell in cells}
    return sum(_identity(verdict.subject) not in keys for verdict in stored_verdicts(path))


def _identity(subject: Mapping[str, Any]) -> str | None:
    """Return a key of the target and the options, whatever the target's configuration is now."""
    of_content = ("shrunk", "configuration", *(["family"] if "target" in subject else []))
    return _key({key: value for key, value in subject.items() if key not in of_content})


def _is_current(verdict: Verdict, cell: Cell) -> bool:
    now = versions(cell.options.backend_name)
    return all(verdict.environment.get(package) == number for package, number in now.items())


def _key(of: Mapping[str, Any]) -> str | None:
    """Return a key that equal subjects share.

    None for a subject with an object: a report contains only its text, which does not identify it.
    """
    try:
        return json.dumps(of, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None


NOT_SHARDED = "not sharded"
LABELS = ("passed", "failed", NOT_SHARDED, "error", "skipped")
SIGNS = {"passed": "✓", "failed": "✗", NOT_SHARDED: "∅", "error": "!", "skipped": "·"}
_LABEL_STYLES = {**STYLES, NOT_SHARDED: STYLES["failed"]}
_STANDING_STYLES = {"known": "dim", "new": "bold red", "gone": "bold red", "": ""}
_OUTCOMES: Mapping[str, Outcome] = {"failed": "failure", "error": "error", "skipped": "skipped"}
_MESSAGE_WIDTH = 100
_REGISTER = "tpcheck/lab/known.toml"
_COLUMNS = (
    Column("family"),
    Column("configuration"),
    Column("verdict", width=7),
    Column("seconds", right=True, width=8),
    Column("summary"),
    Column("register"),
)


def matrix_lines(rows: Sequence[JudgedVerdict]) -> Iterator[Line]:
    """Yield one line for each cell, the number of each verdict, and what the register of known bugs did not expect."""
    yield from table_lines(_table(rows))
    yield Line()
    yield plain(counts(rows), "bold")
    unexpected = [row for row in rows if row.standing in ("new", "gone")]
    if unexpected:
        yield Line()
    for row in unexpected:
        yield from labelled(row.standing, unexpected_message(row), "red")


def standing_lines(row: JudgedVerdict) -> Iterator[Line]:
    """Yield what the register of known bugs says of a verdict."""
    if row.standing == "known" and row.bug is not None:
        see = "; ".join(part for part in (row.bug.link, row.bug.installed_script) if part)
        yield from labelled("upstream", f"{row.bug.name}: {row.bug.what}" + (f"\n{see}" if see else ""))
    elif row.standing:
        yield from labelled(row.standing, unexpected_message(row), "red")


def progress_line(number: int, total: int, row: JudgedVerdict) -> str:
    """Return what is written while a matrix runs; the table at its end has the rest.

    Example:
        >>> progress_line(3, 12, JudgedVerdict(Verdict("passed", {"family": "llama", "backend": "x", "tp": 2}, {})))
        '3 of 12: llama (x, tp=2) passed'
    """
    subject, standing = row.verdict.subject, f", {row.standing}" if row.standing else ""
    return f"{number} of {total}: {words.name(subject)} ({configuration(subject)}) {label(row.verdict)}{standing}"


def _table(rows: Sequence[JudgedVerdict], *, details: bool = False) -> Table:
    """Return a table of the cells; the configuration is left out where all of them share one, unless with details."""
    differ = len({configuration(row.verdict.subject) for row in rows}) > 1
    return Table(_COLUMNS, tuple(_row(row, with_configuration=differ or details, details=details) for row in rows))


def _row(row: JudgedVerdict, *, with_configuration: bool = True, details: bool = False) -> Row:
    verdict, text = row.verdict, label(row.verdict)
    report = as_text([*verdict_lines(verdict), *standing_lines(row)]) if details else ""
    return Row(
        cells=(
            TableCell(words.name(verdict.subject)),
            TableCell(configuration(verdict.subject) if with_configuration else ""),
            TableCell(f"{SIGNS[text]} {text}" if details else text, _LABEL_STYLES[text]),
            TableCell(f"{verdict.seconds:.1f} s"),
            TableCell(summary_line(verdict)),
            TableCell(_standing(row), _STANDING_STYLES[row.standing]),
        ),
        outcome=_OUTCOMES.get(verdict.verdict, "passed"),
        details=report,
        seconds=verdict.seconds,
        is_expected=row.standing == "known" or (not row.standing and verdict.verdict in ("passed", "skipped")),
    )


def counts(rows: Sequence[JudgedVerdict]) -> str:
    """Return `3 passed, 1 failed (1 known)`."""
    number = Counter(label(row.verdict) for row in rows)
    known = Counter(label(row.verdict) for row in rows if row.standing == "known")
    parts = [f"{number[name]} {name}" + (f" ({known[name]} known)" if known[name] else "") for name in LABELS]
    return ", ".join(part for part, name in zip(parts, LABELS, strict=True) if number[name])


def label(verdict: Verdict) -> str:
    """Return the verdict, or `not sharded` where the backend silently left the model whole."""
    first = next(iter(verdict.findings), None)
    left_whole = first is not None and first.check == "parameters_are_sharded" and first.cause == Cause.NOT_SHARDED.slug
    return NOT_SHARDED if left_whole else verdict.verdict


def configuration(subject: Mapping[str, Any]) -> str:
    """Return the options in which cells of one family differ: `deepspeed, tp=2, zero=1`."""
    dtype = subject.get("dtype", "float64")
    parts = [*words.layout(subject), *([str(dtype)] if dtype != "float64" else []), *words.training(subject)]
    return ", ".join(parts)


def summary_line(verdict: Verdict) -> str:
    """Return the first finding, the first line of the message, or the worst margin."""
    if verdict.findings:
        first = verdict.findings[0]
        return f"{first.check}  {place(first)}" + (f"  {first.cause}" if first.cause else "")
    if verdict.message:
        lines = [line.strip() for line in verdict.message.splitlines() if line.strip()]
        return shorten(lines[0], _MESSAGE_WIDTH, placeholder=" ...") if lines else ""
    worst = max((check for check in verdict.checks if check.compared), key=lambda c: c.worst_margin, default=None)
    return "" if worst is None else f"worst margin {words.margin(worst.worst_margin)}  {worst.check}"


def unexpected_message(row: JudgedVerdict) -> str:
    """Return a sentence about a cell that the register did not expect."""
    name = f"{words.name(row.verdict.subject)} ({configuration(row.verdict.subject)})"
    if row.standing == "gone":
        assert row.bug is not None
        return (
            f"{name} passed, but {row.bug.name} is registered for these versions: {row.bug.what} "
            f"If it is fixed, limit its versions in {_REGISTER}."
        )
    if row.bug is not None:
        return f"{name}: {label(row.verdict)}, but not as {row.bug.name} in {_REGISTER} describes: {row.bug.what}"
    return f"{name}: {label(row.verdict)}, and no entry of {_REGISTER} describes this"


def _standing(row: JudgedVerdict) -> str:
    return f"known: {row.bug.name}" if row.standing == "known" and row.bug else row.standing


def matrix_markdown(rows: Sequence[JudgedVerdict]) -> str:
    """Return the summary of a CI job: counts, what was unexpected, and the cells that did not pass."""
    lines = ["### tpcheck", "", counts(rows), ""]
    lines += [f"- **{row.standing}** {markdown_text(unexpected_message(row))}" for row in rows
              if row.standing in ("new", "gone")]  # fmt: skip
    listed = [row for row in rows if row.verdict.verdict != "passed" or row.standing]
    if listed:
        columns = Column("family"), Column("configuration"), Column("verdict"), Column("summary")
        lines += ["", *table_markdown(Table(columns, tuple(map(_markdown_row, listed))))]
    return "\n".join([*lines, "", versions_line(rows), ""]) + "\n"


def _markdown_row(row: JudgedVerdict) -> Row:
    subject, text = row.verdict.subject, label(row.verdict)
    verdict = f"{SIGNS[text]} {text}" + (f", {row.standing}" if row.standing else "")
    texts = words.name(subject), configuration(subject), verdict, summary_line(row.verdict)
    return Row(tuple(map(TableCell, texts)))


def versions_line(rows: Sequence[JudgedVerdict]) -> str:
    """Return the versions of all rows in a line: `torch 2.13.0, transformers 5.23.0`."""
    by_package: dict[str, set[str]] = {}
    for row in rows:
        for package, number in row.verdict.environment.items():
            by_package.setdefault(package, set()).add(number)
    return ", ".join(f"{package} {' and '.join(sorted(numbers))}" for package, numbers in sorted(by_package.items()))


def matrix_html(rows: Sequence[JudgedVerdict]) -> str:
    """Return a page with a row for each cell, whose report opens, and filters."""
    unexpected = sum(row.standing in ("new", "gone") for row in rows)
    seconds = sum(row.verdict.seconds for row in rows)
    subtitle = f"{versions_line(rows)}; {seconds:.0f} seconds of runs"
    if unexpected:
        subtitle += f"; {unexpected} unexpected according to the register of known bugs"
    return tables_html(f"tpcheck: {counts(rows)}", subtitle, [_table(rows, details=True)])


GONE = "known_bug_shows"  # the test case of a registered bug that does not show


def matrix_junit(rows: Sequence[JudgedVerdict]) -> str:
    """Return an XML document that CI servers read: known bugs are skipped, and a bug that is gone fails."""
    return as_junit(_with_register(row) for row in rows)


def _with_register(row: JudgedVerdict) -> Verdict:
    verdict = row.verdict
    if row.standing == "known" and row.bug is not None:
        message = f"known upstream bug {row.bug.name}: {row.bug.what}"
        return replace(verdict, verdict="skipped", findings=(), checks=(), message=message)
    if row.standing == "gone":
        finding = Finding(GONE, {"field": unexpected_message(row)}, observed=1.0, allowed=0.0)
        return replace(verdict, verdict="failed", findings=(finding,))
    return verdict
