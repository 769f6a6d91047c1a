"""The model as a tree with the margins of its modules: whole for a page, folded to a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tpcheck.core.check_names import ON_REQUEST
from tpcheck.core.findings import MarginPhase, ModuleMargins, Verdict
from tpcheck.report import words
from tpcheck.report.findings import first_finding, is_consequence, module_of
from tpcheck.report.table import Cell, Column, Row, Table
from tpcheck.report.tree import Node, tree_of, without_lists

State = Literal["wrong", "fine", "unknown"]
Margins = tuple[float | None, ...]  # of each phase that is shown

_PHASES: tuple[MarginPhase, ...] = ("forward", "backward", "weights")
MOST_LINES = 12  # with the heading; what does not fit is folded
_NAMES_SHOWN, _LONGEST_LABEL = 3, 48
ROOT = "(the whole model)"


@dataclass(frozen=True, slots=True)
class ModelTree:
    """A model with its margins.

    Attributes:
        root: Its modules.
        first_wrong: The module that the first finding is about; None where there is none.
        wrong: Every module that a finding is about which does not follow from another.
        phases: Which margins of modules are shown.

    Findings about what was saved, resumed or drawn are left out: they say nothing of what the module computes.
    """

    root: Node[ModuleMargins]
    first_wrong: str | None
    wrong: frozenset[str]
    phases: tuple[MarginPhase, ...] = ("forward", "backward")

    @classmethod
    def of(cls, verdict: Verdict) -> ModelTree:
        measured = [finding for finding in verdict.findings if finding.check not in ON_REQUEST]
        found = [module_of(finding) for finding in measured if not is_consequence(finding)]
        wrong = [module for module in found if module is not None]
        first, modules = first_finding(measured), verdict.modules
        return cls(
            tree_of({each.module: each for each in modules}),
            None if first is None else module_of(first),
            frozenset(wrong),
            tuple(
                phase for phase in _PHASES if phase != "weights" or any(each.weights is not None for each in modules)
            ),
        )

    def state(self, node: Node[ModuleMargins]) -> State:
        """Return the state of one module, without those inside of it."""
        margins = [margin for margin in self.margins(node) if margin is not None]
        if node.path in self.wrong or any(is_wrong(margin) for margin in margins):
            return "wrong"
        return "fine" if margins else "unknown"

    def inner_state(self, node: Node[ModuleMargins]) -> State:
        """Return the worst state of a module and of those inside of it."""
        states = {self.state(each) for each in node.walk()}
        return "wrong" if "wrong" in states else "fine" if "fine" in states else "unknown"

    def margins(self, node: Node[ModuleMargins]) -> Margins:
        """Return the margins of one module."""
        return tuple(None if node.value is None else getattr(node.value, phase) for phase in self.phases)

    def worst_margins(self, nodes: Iterable[Node[ModuleMargins]]) -> Margins:
        """Return the worst margins of these modules and of all inside of them."""
        by_module = [self.margins(each) for node in nodes for each in node.walk()]
        return tuple(
            max((margin for margin in of_phase if margin is not None), default=None)
            for of_phase in zip(*by_module, strict=True)
        )

    def remark(self, node: Node[ModuleMargins]) -> str:
        """Return what words say of a module, beside its margins."""
        if node.path == self.first_wrong:
            return "first wrong"
        return "wrong" if self.state(node) == "wrong" else ""


def is_wrong(margin: float | None) -> bool:
    """Return whether a margin is beyond what is allowed."""
    return margin is not None and not margin <= 1


# ---- a few lines


@dataclass(frozen=True, slots=True)
class _Opened:
    """Which modules are opened, and how those beside them are put together: by a key of name and state."""

    paths: frozenset[str]
    together: Callable[[str, State], Hashable]


def model_table(verdict: Verdict) -> Table:
    """Return the model in short: the path to the first wrong module is opened, what is fine beside it is folded.

    Where all is fine, modules are opened down to the layers as long as there are few lines.
    """
    tree = ModelTree.of(verdict)
    columns = Column("module"), *(Column(phase, right=True) for phase in tree.phases), Column("")
    rows = _rows_that_fit(tree) if verdict.modules else []
    return Table(columns, tuple(rows), title="Model", has_heading=True, indent=2)


def _rows_that_fit(tree: ModelTree) -> list[Row]:
    def by_list(name: str, state: State) -> Hashable:
        return name.rstrip("0123456789"), state

    def by_state(name: str, state: State) -> Hashable:
        return state

    path = ancestors(tree.first_wrong) if tree.first_wrong is not None else frozenset({""})
    rows = list(_rows(tree, _Opened(path, by_list)))
    if len(rows) >= MOST_LINES:
        return list(_rows(tree, _Opened(path, by_state)))
    if tree.inner_state(tree.root) == "wrong":
        return rows
    for node in tree.root.walk():
        if any(each.is_list for each in node.walk()) and not node.is_list and not is_in_list(node.path):
            more = list(_rows(tree, _Opened(path | {node.path}, by_list)))
            if len(more) < MOST_LINES:
                path, rows = path | {node.path}, more
    return rows


def ancestors(path: str) -> frozenset[str]:
    """Return the names above one, that of the root included."""
    parts = path.split(".")
    return frozenset(".".join(parts[:number]) for number in range(len(parts)))


def is_in_list(path: str) -> bool:
    """Return whether a module is an entry of a list, or inside of one."""
    return any(part.isdigit() for part in path.split("."))


def _rows(tree: ModelTree, opened: _Opened) -> Iterator[Row]:
    yield _row(ROOT, tree.margins(tree.root), tree.remark(tree.root), depth=0)
    yield from _rows_below(tree, tree.root, opened, depth=1)


def _rows_below(tree: ModelTree, node: Node[ModuleMargins], opened: _Opened, depth: int) -> Iterator[Row]:
    groups: dict[Hashable, list[tuple[str, Node[ModuleMargins]]]] = {}
    for name, child in without_lists(node):
        is_apart = child.path in opened.paths or child.path == tree.first_wrong
        key = child.path if is_apart else (opened.together(name, tree.inner_state(child)),)
        groups.setdefault(key, []).append((name, child))
    for group in groups.values():
        (name, child), *others = group
        if others or child.path not in opened.paths:
            yield _folded_row(tree, group, depth)
        else:
            yield _row(name, tree.margins(child), tree.remark(child), depth)
            yield from _rows_below(tree, child, opened, depth + 1)


def _folded_row(tree: ModelTree, group: list[tuple[str, Node[ModuleMargins]]], depth: int) -> Row:
    modules = [each for _, node in group for each in node.walk() if each.value is not None]
    label = _names_that_fit(words.compact_names([name for name, _ in group]), _LONGEST_LABEL - 2 * depth)
    wrong = sum(tree.state(each) == "wrong" for each in modules)
    if len(modules) <= 1:
        remark = tree.remark(group[0][1])
    elif any(each.path == tree.first_wrong for each in modules):
        remark = f"first wrong; {wrong} of {len(modules)} modules wrong"
    else:
        remark = f"{wrong} of {len(modules)} modules wrong" if wrong else f"worst of {len(modules)} modules"
    return _row(label, tree.worst_margins(node for _, node in group), remark, depth)


def _names_that_fit(names: list[str], longest: int) -> str:
    texts = [words.join_truncated(names, number) for number in range(min(_NAMES_SHOWN, len(names)), 0, -1)]
    return next((text for text in texts if len(text) <= longest), texts[-1])


def _row(label: str, margins: Margins, remark: str, depth: int) -> Row:
    text = "  " * depth + label
    shown = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
    style = "red" if "wrong" in remark else "dim"
    return Row((Cell(shown), *map(_margin_cell, margins), Cell(remark, style)))


def _margin_cell(margin: float | None) -> Cell:
    if margin is None:
        return Cell("-", "dim")
    return Cell(words.margin(margin), "red" if is_wrong(margin) else "green")
