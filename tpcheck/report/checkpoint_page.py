"""The page about a checkpoint: what happened to which tensors, and all of them as a tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tpcheck.core.findings import Finding, Verdict
from tpcheck.report import checkpoints, words
from tpcheck.report.charts import shortened
from tpcheck.report.page import TreeRow, frame, shown_finding
from tpcheck.report.table import Cell, Column, Table
from tpcheck.report.templates import render
from tpcheck.report.tree import Node, joined, tree_of

TensorState = Literal["equal", "different", "missing", "unexpected", "not compared"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the reference, or one that the checkpoint alone has.

    Attributes:
        name: Its name in the reference; in the checkpoint for one that is unexpected.
        state: What the comparison found.
        shape, dtype: As it should be; None where it cannot be read.
    """

    name: str
    state: TensorState
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """Every tensor of a checkpoint and its reference, in the reference's order."""

    tensors: tuple[StoredTensor, ...] = ()


MOST_ROWS = 3000  # of the tree; beyond, what is inside of modules without a difference is left out
_MOST_DETAILS = 40  # findings with all lines
_SIGNS: Mapping[TensorState, tuple[str, str]] = {
    "equal": ("✓ equal", "within"),
    "different": ("✗ differs", "wrong-3"),
    "missing": ("✗ missing", "wrong-3"),
    "unexpected": ("✗ unexpected", "wrong-2"),
    "not compared": ("? not compared", "dim"),
}
_COLUMNS = (
    Column("tensor"),
    Column("result"),
    Column("shape", right=True),
    Column("dtype"),
    Column("cause"),
    Column("elements that differ", right=True),
    Column("first at"),
)


def checkpoint_page(verdict: Verdict, stored: StoredTensors, checks: Table) -> str:
    """Return the page of a comparison of two checkpoints."""
    subject = verdict.subject
    groups = checkpoints.group_by_explanation(verdict.findings)
    firsts = [group[0] for group in groups] or list(verdict.findings)
    rows, left_out = _tree_rows(verdict, stored)
    name = shortened(str(subject.get("subject", "checkpoint")), 200)
    reference = shortened(str(subject.get("reference", "the reference")), 300)
    return render(
        "checkpoint_page.html",
        **frame(verdict, checks),
        title=shortened(f"{verdict.verdict}: checkpoint {name} against {reference} - tpcheck", 300),
        name=name,
        reference=reference,
        options=", ".join(words.options({key: value for key, value in subject.items() if key not in _IN_HEADING})),
        summary=_summary(verdict, stored),
        renamed=[shortened(str(text), 300) for text in subject.get("names", ())],
        groups=[checkpoints.group_summary(group) for group in groups],
        firsts=[shown_finding(finding, subject) for finding in firsts[:_MOST_DETAILS]],
        columns=_COLUMNS,
        rows=rows,
        left_out=left_out,
    )


_IN_HEADING = ("subject", "reference", "names")


def _summary(verdict: Verdict, stored: StoredTensors) -> str:
    number = Counter(tensor.state for tensor in stored.tensors)
    total = words.pluralize(len(stored.tensors), "tensor")
    if verdict.verdict == "skipped":
        return "Nothing could be compared."
    found = ", ".join(f"{number[state]} {state}" for state in _SIGNS if number[state] and state != "equal")
    if verdict.verdict == "passed":
        return f"Equal to the bit: {number['equal']} of {total}{f' ({found})' if found else ''}."
    groups = checkpoints.group_by_explanation(verdict.findings)
    cause = f"; most: {groups[0][0].cause}" if groups and groups[0][0].cause else ""
    states = sum("states" in finding.evidence for finding in verdict.findings)
    of_states = f", and {words.pluralize(states, 'value')} of training states" if states else ""
    return f"Of {total}: {number['equal']} equal, {found or 'none different'}{of_states}{cause}."


def _tree_rows(verdict: Verdict, stored: StoredTensors) -> tuple[list[TreeRow], str]:
    findings: dict[str, Finding] = {}
    for finding in verdict.findings:
        if "states" not in finding.evidence:
            findings.setdefault(str(finding.where.get("parameter")), finding)
    root = joined(tree_of({tensor.name: tensor for tensor in stored.tensors}))
    total = sum(1 for _ in root.walk())
    rows = [
        row for child in root.children for row in _rows(child, 0, findings, keeps_equal=total <= MOST_ROWS)
    ][:MOST_ROWS]  # fmt: skip
    left_out = total - 1 - len(rows)
    return rows, f"{left_out} rows are left out, most of them of tensors that are equal." if left_out else ""


def _rows(
    node: Node[StoredTensor], level: int, findings: Mapping[str, Finding], *, keeps_equal: bool
) -> Iterator[TreeRow]:
    tensors = [each.value for each in node.walk() if each.value is not None]
    number = Counter(tensor.state for tensor in tensors)
    is_wrong = any(_is_wrong(tensor.state) for tensor in tensors)
    has_children = bool(node.children) and (keeps_equal or is_wrong)
    value = node.value
    yield TreeRow(
        level=level,
        name=node.name,
        path=node.path,
        look="wrong" if value is not None and _is_wrong(value.state) else "fine" if value is not None else "unknown",
        cells=_summed_cells(number) if value is None else _cells(value, findings.get(value.name)),
        has_children=has_children,
        is_open=is_wrong,
    )
    for child in node.children if has_children else ():
        yield from _rows(child, level + 1, findings, keeps_equal=keeps_equal)


_WORST_FIRST: tuple[TensorState, ...] = ("different", "missing", "unexpected", "not compared", "equal")


def _is_wrong(state: TensorState) -> bool:
    return state in ("different", "missing", "unexpected")


def _summed_cells(number: Mapping[TensorState, int]) -> tuple[Cell, ...]:
    total = sum(number.values())
    worst = next(state for state in _WORST_FIRST if number[state])
    sign, style = _SIGNS[worst]
    count = f"all {total}" if number[worst] == total else f"{number[worst]} of {total}"
    return Cell(f"{sign} ({count})", style), *[Cell("")] * (len(_COLUMNS) - 2)


def _cells(tensor: StoredTensor, finding: Finding | None) -> tuple[Cell, ...]:
    sign, style = _SIGNS[tensor.state]
    shape = "" if tensor.shape is None else " x ".join(map(str, tensor.shape)) or "a number"
    known = Cell(sign, style), Cell(shape), Cell(tensor.dtype or "")
    if finding is None:
        return *known, Cell(""), Cell(""), Cell("")
    evidence = finding.evidence
    differing = f"{evidence['count_differing']} of {evidence['count_total']}" if "count_differing" in evidence else ""
    differing = differing or checkpoints.amount(finding) or ""
    return *known, Cell(finding.cause or "unknown"), Cell(differing), Cell(_first(finding))


def _first(finding: Finding) -> str:
    """Return the first element that differs, with both values."""
    if finding.where.get("index") is None:
        return ""
    actual, expected = (_rounded(finding.evidence.get(side)) for side in ("actual", "expected"))
    values = f": {actual}, expected {expected}" if actual and expected else ""
    return f"{words.index(finding.where['index'])}{values}"


def _rounded(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
