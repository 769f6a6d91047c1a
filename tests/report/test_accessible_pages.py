"""Every page has what screen readers find their way by: landmarks, headings in order, named tables with row headers."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.report import test_run_page, test_table, test_verdict_page
from tests.report.examples import ERROR, FAILED, PASSED
from tpcheck.lab.known import JudgedVerdict
from tpcheck.lab.matrix import matrix_html
from tpcheck.report.report import Report
from tpcheck.report.table import tables_html

WITH_TREE = replace(FAILED, findings=(test_verdict_page.WITH_MAP, *FAILED.findings), modules=test_verdict_page.TREE)
PAGES = {
    "passed": Report(PASSED).to_html(),
    "failed": Report(WITH_TREE).to_html(),
    "error": Report(ERROR).to_html(),
    "checkpoint": Report(test_verdict_page.CHECKPOINT, test_verdict_page.STORED).to_html(),
    "runs": Report(test_run_page.FAILED, test_run_page.PICTURE).to_html(),
    "equal runs": Report(test_run_page.PASSED, test_run_page.PICTURE).to_html(),
    "tables": tables_html("tables", "two of them", [test_table.TABLE, test_table.TABLE]),
    "matrix": matrix_html([JudgedVerdict(PASSED), JudgedVerdict(FAILED)]),
}
VOID = {"meta", "input"}
IN_FIGURES = {"figcaption", "h3", "h4", "svg", "ul"}


class Outline(HTMLParser):
    """The tags of a page in their nesting: (tag, its attributes, tags of its children)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = [("", [])]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        children: list[str] = []
        self._open[-1][1].append(tag)
        self.elements.append((tag, dict(attrs), children))
        if tag not in VOID:
            self._open.append((tag, children))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def all(self, *tags: str) -> list[tuple[str, dict[str, str | None], list[str]]]:
        return [element for element in self.elements if element[0] in tags]


@pytest.fixture(params=PAGES)
def outline(request: pytest.FixtureRequest) -> Outline:
    return Outline(PAGES[request.param])


def test_contents_are_the_main_landmark(outline: Outline) -> None:
    assert len(outline.all("main")) == 1
    (body,) = outline.all("body")
    assert set(body[2]) == {"main", "script"}


def test_headings_begin_with_the_first_level_and_leave_out_none(outline: Outline) -> None:
    levels = [int(tag[1]) for tag, *_ in outline.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip([0, *levels], levels, strict=False))


def test_tables_have_names_and_their_rows_headers(outline: Outline) -> None:
    ids = {attributes.get("id") for _, attributes, _ in outline.elements}
    for _, attributes, children in outline.all("table"):
        labelled = attributes.get("aria-labelledby")
        assert "caption" in children or attributes.get("aria-label") or (labelled and labelled in ids)
    for _, attributes, _ in outline.all("th"):
        assert attributes.get("scope") in ("col", "row", "rowgroup")
    starts = [children[0] for _, _, children in outline.all("tr") if len(children) > 1]
    corners = sum(attributes.get("aria-label") == "the two runs" for _, attributes, _ in outline.all("table"))
    assert starts.count("td") == corners


def test_a_figure_has_one_caption_at_its_beginning_or_end(outline: Outline) -> None:
    for _, _, children in outline.all("figure"):
        assert children.count("figcaption") == 1
        assert "figcaption" in (children[0], children[-1])
        assert set(children) <= IN_FIGURES
