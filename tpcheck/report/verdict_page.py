"""The page about one run: the verdict, the first finding with where its error lies, and the model as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpcheck.core.findings import Finding, ModuleMargins, Verdict
from tpcheck.report import checkpoints, words
from tpcheck.report.charts import legend_keys, shortened
from tpcheck.report.error_maps import DrawnMap, map_of_finding
from tpcheck.report.findings import first_finding, is_consequence
from tpcheck.report.model_tree import ROOT, ModelTree, ancestors, is_in_list, is_wrong
from tpcheck.report.page import (
    ShownFinding,
    TreeRow,
    coverage_text,
    first_place,
    frame,
    shown_finding,
)
from tpcheck.report.table import Cell, Column, Table
from tpcheck.report.templates import render
from tpcheck.report.tree import Node

MOST_ROWS = 2000  # of the tree; beyond, what is inside of modules without a mistake is left out
_MOST_FINDINGS, _MOST_MAPS = 40, 8

EXPLANATION = (
    "A margin is the observed error divided by the largest error that rounding explains, which was measured in the "
    "same run by replays of the unsharded model under perturbed rounding: up to 1 (✓) is rounding, more (✗) is a "
    "difference, and a mistake in float64 stands at 1,000 or far above. A dash means that nothing was compared."
)
_COLUMNS = (
    Column("module"),
    Column("forward", right=True),
    Column("backward", right=True),
    Column("inside", right=True),
    Column("remark"),
)


def verdict_page(verdict: Verdict, checks: Table, upstream: str = "") -> str:
    """Return the page; `upstream` is what the register of known bugs says of the run."""
    first = first_finding(verdict.findings)
    others = [finding for finding in verdict.findings if finding is not first]
    tree = ModelTree.of(verdict)
    rows, folded = _tree_rows(tree) if verdict.modules else ([], "")
    options = ", ".join(words.options(verdict.subject))
    return render(
        "verdict_page.html",
        **frame(verdict, checks),
        title=shortened(f"{verdict.verdict}: {words.name(verdict.subject)}, {options} - tpcheck", 300),
        name=shortened(words.name(verdict.subject), 300),
        options=options,
        summary=_summary(verdict, first),
        upstream=upstream,
        groups=[checkpoints.group_summary(group) for group in checkpoints.group_by_explanation(verdict.findings)],
        first=None if first is None else shown_finding(first, verdict.subject),
        first_map=None if first is None else map_of_finding(first),
        others=list(_with_maps(others[:_MOST_FINDINGS], verdict.subject)),
        more=max(0, len(others) - _MOST_FINDINGS),
        ramp=legend_keys()["ramp"],
        explanation=EXPLANATION,
        columns=_COLUMNS,
        rows=rows,
        folded=folded,
        target=list(words.target_facts(verdict.subject, verdict.notes)),
    )


def _with_maps(
    findings: Sequence[Finding], subject: Mapping[str, Any]
) -> Iterator[tuple[ShownFinding, DrawnMap | None]]:
    """Yield the findings with the maps of those that do not follow from another, as far as the page stays small."""
    drawn = 0
    for finding in findings:
        tiles = None if is_consequence(finding) or drawn == _MOST_MAPS else map_of_finding(finding)
        drawn += tiles is not None
        yield shown_finding(finding, subject), tiles


def _summary(verdict: Verdict, first: Finding | None) -> str:
    compared = f"{coverage_text(verdict.coverage)}." if verdict.coverage.total else ""
    if first is not None:
        return " ".join(part for part in (f"{first_place(first)}.", compared) if part)
    if verdict.verdict != "passed":
        return {"skipped": "Nothing was decided.", "error": "The run ended with an error."}.get(verdict.verdict, "")
    worst = max((check for check in verdict.checks if check.compared), key=lambda each: each.worst_margin, default=None)
    if worst is None or not worst.worst_margin:
        return " ".join(part for part in ("No check found a difference.", compared) if part)
    at = f" ({worst.worst_at})" if worst.worst_at else ""
    margin = words.margin(worst.worst_margin)
    return f"Nothing is further off than rounding explains: the worst margin is {margin}{at}. {compared}"


# ---- the tree


def _tree_rows(tree: ModelTree) -> tuple[list[TreeRow], str]:
    """Return the rows, and a sentence on what is left out."""
    total = sum(1 for _ in tree.root.walk())
    rows = list(_rows(tree, tree.root, 0, keeps_fine=total <= MOST_ROWS))[:MOST_ROWS]
    left_out = total - len(rows)
    folded = f"{words.pluralize(left_out, 'module')} left out that hold no mistake, or stand last; --json has them."
    return rows, folded if left_out else ""


def _rows(tree: ModelTree, node: Node[ModuleMargins], level: int, *, keeps_fine: bool) -> Iterator[TreeRow]:
    is_shown_inside = bool(node.children) and (keeps_fine or tree.inner_state(node) == "wrong")
    inside = [each for each in node.walk() if each is not node and each.value is not None]
    state, is_first = tree.state(node), node.path == tree.first_wrong
    yield TreeRow(
        level=level,
        name=node.name or ROOT,
        path=node.path or ROOT,
        look=state,
        cells=(
            *(_margin_cell(margin, is_called=node.value is not None) for margin in tree.margins(node)),
            _inside_cell(tree, node, inside),
            Cell("first wrong" if is_first else "finding" if node.path in tree.wrong else "", "remark"),
        ),
        has_children=is_shown_inside,
        is_open=not is_in_list(node.path) or node.path in ancestors(tree.first_wrong or ""),
        is_pointed=is_first,
    )
    for child in node.children if is_shown_inside else ():
        yield from _rows(tree, child, level + 1, keeps_fine=keeps_fine)


def _inside_cell(tree: ModelTree, node: Node[ModuleMargins], inside: Sequence[Node[ModuleMargins]]) -> Cell:
    worst = [margin for margin in tree.worst_margins(node.children) if margin is not None] if inside else []
    if not worst:
        return Cell("")
    wrong = sum(tree.state(each) == "wrong" for each in inside)
    counted = f"{wrong} of {len(inside)} wrong" if wrong else words.pluralize(len(inside), "module")
    cell = _margin_cell(max(worst), is_called=True)
    return Cell(f"{cell.text} ({counted})", cell.style)


def _margin_cell(margin: float | None, *, is_called: bool) -> Cell:
    """Return a margin with its sign, so that colour is not all that tells it."""
    if margin is None:
        return Cell("-" if is_called else "", "dim")
    if not is_wrong(margin):
        return Cell(f"✓ {words.margin(margin)}", "within")
    return Cell(f"✗ {words.margin(margin)}", "wrong-1" if margin <= 10 else "wrong-2" if margin <= 1e3 else "wrong-3")
