"""Many verdicts as Markdown: the summary of a CI job, and the table in the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tpcheck.families.upstream import Judged
from tpcheck.report import words
from tpcheck.report.matrix import SIGNS, configuration, counts, gist, label, surprise

_IN_TABLES = str.maketrans({"|": "\\|", "\n": " ", "<": "&lt;", ">": "&gt;"})


def matrix_markdown(rows: Sequence[Judged]) -> str:
    """Return what a CI server shows beside a job: counts, what is unexpected, and what did not pass."""
    lines = ["### tpcheck", "", f"{counts(rows)}", ""]
    lines += [f"- **{row.standing}** {_cell(surprise(row))}" for row in rows if row.standing in ("new", "gone")]
    told = [row for row in rows if row.verdict.verdict != "passed" or row.standing]
    if told:
        lines += ["", "| family | configuration | verdict | |", "| --- | --- | --- | --- |", *map(_told_row, told)]
    return "\n".join([*lines, "", f"{versions(rows)}", ""]) + "\n"


def families_markdown(rows: Sequence[Judged]) -> Iterator[str]:
    """Yield the lines of a table with a row for each family and a column for each configuration."""
    columns = list(dict.fromkeys(configuration(row.verdict.subject) for row in rows))
    by_family: dict[str, dict[str, Judged]] = {}
    for row in rows:
        by_family.setdefault(words.name(row.verdict.subject), {})[configuration(row.verdict.subject)] = row
    yield "| family | " + " | ".join(columns) + " |"
    yield "| --- |" + " --- |" * len(columns)
    for family, cells in by_family.items():
        yield f"| {family} | " + " | ".join(_short(cells.get(column)) for column in columns) + " |"


def versions(rows: Sequence[Judged]) -> str:
    """Return the versions of all rows in a line: `torch 2.13.0, transformers 5.23.0`."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for package, number in row.verdict.environment.items():
            found.setdefault(package, set()).add(number)
    return ", ".join(f"{package} {' and '.join(sorted(numbers))}" for package, numbers in sorted(found.items()))


def _short(row: Judged | None) -> str:
    if row is None:
        return ""
    text = label(row.verdict)
    sign = f"{SIGNS[text]} {text}"
    if row.verdict.verdict == "passed":
        return sign
    named = f" ({row.bug.name})" if row.standing == "known" and row.bug is not None else ""
    if row.verdict.findings:
        first = row.verdict.findings[0]
        return _cell(f"{sign}{named}: {first.cause or first.check}")
    return _cell(f"{sign}{named}") if named else _cell(f"{sign}: {gist(row.verdict)}")


def _told_row(row: Judged) -> str:
    subject: Mapping[str, object] = row.verdict.subject
    text = label(row.verdict)
    standing = f", {row.standing}" if row.standing else ""
    return (
        f"| {_cell(words.name(subject))} | {_cell(configuration(subject))} | {SIGNS[text]} {text}{standing} "
        f"| {_cell(gist(row.verdict))} |"
    )


def _cell(text: str) -> str:
    return text.translate(_IN_TABLES)
