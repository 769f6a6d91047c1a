"""One table, rendered as text, Markdown, HTML, JUnit and JSON."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

from tpcheck.report.table import (
    Cell,
    Column,
    Row,
    Table,
    junit_xml,
    markdown_text,
    rows_json,
    table_lines,
    table_markdown,
    table_suites,
    tables_html,
)
from tpcheck.report.words import as_text, plain

COLUMNS = (Column("name"), Column("seconds", right=True, width=6), Column("unused"), Column("result"))
GOOD = Row((Cell("a"), Cell("1.5"), Cell(""), Cell("passed", "green")), name="a", group="first", seconds=1.5)
BAD = Row(
    (Cell("b|<b>", link="https://example.org/1"), Cell("20.25"), Cell(""), Cell("failed", "bold red")),
    name="b",
    group="second",
    notes=(plain("    a note"),),
    outcome="failure",
    message="it differs",
    details="the <whole> report",
    seconds=20.25,
    is_expected=False,
)
TABLE = Table(COLUMNS, (GOOD, BAD), title="Results", totals=(("passed", Cell("1 of 2", "bold red")),), indent=2)


def test_text_aligns_columns_leaves_out_empty_ones_and_separates_groups() -> None:
    assert as_text(table_lines(TABLE)) == (
        "first\n  a         1.5  passed\n\nsecond\n  b|<b>   20.25  failed\n    a note\n  passed    1 of 2\n"
    )


def test_a_heading_widens_the_columns_that_are_not_empty() -> None:
    rows = (Row((Cell("a"), Cell("1"), Cell(""))),)
    table = Table((Column("parameter"), Column("compared", right=True), Column("at")), rows, has_heading=True)
    assert as_text(table_lines(table)) == "parameter  compared\na                 1\n"


def test_a_table_without_rows_is_its_totals() -> None:
    assert as_text(table_lines(Table(COLUMNS, totals=(("all", Cell("0")),)))) == "  all       0\n"


def test_markdown_escapes_cells_and_links_only_to_web_pages() -> None:
    assert list(table_markdown(TABLE)) == [
        "| name | seconds | unused | result |",
        "| --- | ---: | --- | --- |",
        "| a | 1.5 |  | passed |",
        "| [b\\|&lt;b&gt;](https://example.org/1) | 20.25 |  | failed |",
    ]
    script = Table((Column("x"),), (Row((Cell("a", link="javascript:alert(1)"),)),))
    assert list(table_markdown(script))[-1] == "| a |"
    assert markdown_text("a\nb") == "a b"


def test_the_page_escapes_text_and_has_a_row_for_each_row() -> None:
    page = tables_html("A <title>", "a subtitle", [TABLE])
    assert "<title>A &lt;title&gt;</title>" in page
    assert page.count("<tr data-outcome=") == 2
    assert 'data-outcome="failure" data-expected="false"' in page
    assert '<a href="https://example.org/1">b|&lt;b&gt;</a>' in page
    assert "<pre>the &lt;whole&gt; report</pre>" in page
    assert "a note" in page
    assert '<dt>passed</dt><dd class="bold red">1 of 2</dd>' in page


def test_junit_has_a_suite_for_each_group() -> None:
    root = ET.fromstring(junit_xml(table_suites(TABLE), "tool"))
    assert root.get("name") == "tool"
    first, second = root
    assert (first.get("name"), first.get("tests"), first.get("failures")) == ("first", "1", "0")
    assert (second.get("failures"), second.get("time")) == ("1", "20.250")
    (case,) = second
    (failure,) = case
    assert (case.get("name"), failure.tag, failure.get("message")) == ("b", "failure", "it differs")
    assert failure.text == "the <whole> report"


def test_junit_replaces_characters_that_xml_cannot_represent() -> None:
    document = junit_xml([("suite\a", 0.0, [Row(name="case", outcome="error", message="a \x1b[0m message")])])
    assert "\x1b" not in document
    assert ET.fromstring(document)[0].get("name") == "suite?"


def test_json_has_one_row_a_line() -> None:
    text = rows_json({"schema": 1, "verdict": "passed"}, rows=[{"a": 1}, {"a": None}], others=[])
    assert json.loads(text) == {"schema": 1, "verdict": "passed", "rows": [{"a": 1}, {"a": None}], "others": []}
    assert text.splitlines()[4:6] == ['{"a": 1},', '{"a": null}']


def test_a_column_that_is_empty_takes_no_room_whatever_its_least_width() -> None:
    columns = Column("name"), Column("margin", width=8), Column("result")
    rows = (Row((Cell("a"), Cell(""), Cell("passed"))),)
    assert as_text(table_lines(Table(columns, rows))) == "a  passed\n"
