"""The table of faults as text, JSON, JUnit and an HTML page."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.lab.faults.fault_examples import BAD, CLEAN, ELSEWHERE, EXACT, FALSE_POSITIVE, GOOD, MISSED, RIGHT
from tests.schema import document
from tpcheck.lab.faults.report import fault_lines, faults_html, faults_json, faults_junit
from tpcheck.lab.faults.results import KINDS, Score
from tpcheck.report.words import as_text

TEXT = """\
forward collectives
  caught  reduce_skipped           5.7e+13    1.3 s  model.layers.0.mlp.down_proj; missing_reduce; by outputs_match_reference, replicas_agree

layout
  caught  slopes_of_another_rank   2.0e+04    1.5 s  model.norm; bias_added_per_rank; by outputs_match_reference
          place   model.norm, but it is in model.a, model.b, model.c and 1 more
          cause   bias_added_per_rank, expected head_mapping_wrong or none
  missed  quiet                        0.3    0.0 s
          a fault that <b>nobody</b> sees
  error   loud                           0    0.0 s
          RuntimeError: <boom>
          a fault that crashes

checkpoint
  caught  saved_one_bit              exact    0.0 s  model.x; by checkpoint_matches_reference

precision
  hidden  small                        0.4    0.0 s
          too small for this dtype

alarm   opt tp=2 dp=1 zero=0  seed 0  false positive
  caught    3 of 5 faults
  place     2 of 5 right (40%)
  cause     2 of 5 right (40%)
  beyond    also caught 0 of 1 faults too small to require at this dtype
  alarms    1 of 2 clean controls
  margin    2.0e+04 or more for a fault (slopes_of_another_rank)
  noise     3 at most for a clean run (opt tp=2 dp=1 zero=0)
  seconds   12.0
"""  # noqa: E501


def test_the_text_shows_below_each_row_what_is_wrong() -> None:
    assert as_text(fault_lines(BAD, 12.0)) == TEXT


def test_a_table_is_good_if_all_faults_are_caught_nearly_all_named_right_without_a_false_positive() -> None:
    assert GOOD.is_good
    assert not BAD.is_good
    assert not Score.of([RIGHT, MISSED]).is_good
    assert not Score.of([RIGHT, FALSE_POSITIVE]).is_good
    assert Score.of([*[RIGHT] * 19, CLEAN]).is_good
    assert not Score.of([*[RIGHT] * 9, ELSEWHERE]).is_good  # nine of ten places
    assert Score.of([CLEAN]).is_good


def test_json_has_every_result_and_no_infinity() -> None:
    data = document(faults_json(BAD, {"torch": "2.13.0"}, 12.0), "faults")
    assert (data["schema"], data["verdict"], data["environment"]) == (1, "failed", {"torch": "2.13.0"})
    assert [row["outcome"] for row in data["faults"]] == ["caught", "caught", "caught", "missed", "error", "hidden"]
    assert [row["outcome"] for row in data["controls"]] == ["clean", "alarm"]
    assert data["summary"] == {
        "faults": 5,
        "caught": 3,
        "right_places": 2,
        "right_causes": 2,
        "controls": 2,
        "alarms": 1,
        "least_margin": 2e4,
        "worst_clean_margin": 3.0,
    }
    assert [row["margin"] for row in data["faults"] if row["fault"] == EXACT.fault] == [None]


def test_junit_fails_missed_faults_wrong_names_and_false_positives() -> None:
    root = ET.fromstring(faults_junit(BAD))
    failed = {case.get("name") for case in root.iter("testcase") if case.find("failure") is not None}
    crashed = {case.get("name") for case in root.iter("testcase") if case.find("error") is not None}
    assert failed == {"slopes_of_another_rank seed 0", "quiet seed 0", "opt tp=2 dp=1 zero=0 seed 0"}
    assert crashed == {"loud seed 0"}
    assert sum(int(suite.get("tests", 0)) for suite in root) == 8


@pytest.mark.parametrize("score", [GOOD, BAD, Score.of([]), Score.of([CLEAN]), Score.of([EXACT])])
def test_the_page_needs_nothing_else_and_is_well_formed(score: Score) -> None:
    page = faults_html(score, {"torch": "2.13.0"}, 12.0)
    assert not re.findall(r"<(?:link|img|iframe)\b|@import|url\(|src=", page)
    assert set(re.findall(r'(?:href|src)="([^"]*)"', page)) <= {RIGHT.link}
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


def test_the_page_escapes_names_and_messages() -> None:
    page = faults_html(BAD, {"<b>": "1"}, 12.0)
    assert "<b>nobody" not in page
    assert "&lt;b&gt;nobody" in page
    assert "&lt;boom&gt;" in page


def test_the_page_shows_what_is_right_where_something_else_was_named() -> None:
    page = faults_html(BAD, {}, 12.0)
    assert "place   model.norm, but it is in model.a, model.b, model.c and 1 more" in page
    assert "cause   bias_added_per_rank, expected head_mapping_wrong or none" in page
    assert page.count('data-expected="false"') == 4


def test_a_link_that_is_no_web_address_is_not_made() -> None:
    from dataclasses import replace

    page = faults_html(Score.of([replace(RIGHT, link="javascript:alert(1)")]), {}, 1.0)
    assert "javascript" not in page


class Balanced(HTMLParser):
    """Keeps the elements that are open."""

    VOID = ("meta", "br", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_margins_are_those_of_the_dtype_of_most() -> None:
    in_float16 = replace(CLEAN, dtype="float16", margin=9.0)
    assert Score.of([CLEAN, CLEAN, in_float16]).worst == CLEAN


def test_the_documentation_says_of_every_kind_what_is_injected() -> None:
    page = (Path(__file__).parents[3] / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|", page[page.index("## What is injected") :], re.MULTILINE)
    assert [kind for kind in KINDS if not any(kind in row for row in rows)] == []
