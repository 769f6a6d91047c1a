"""JUnit XML has one test case for each check."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree as ET

from tests.report.examples import ERROR, FAILED, PASSED, SKIPPED
from tpcheck.report.report import Report, as_junit


def cases(document: str) -> dict[str, list[str]]:
    return {case.get("name", ""): [child.tag for child in case] for case in ET.fromstring(document).iter("testcase")}


def test_a_check_with_nothing_to_compare_is_skipped() -> None:
    assert cases(Report(PASSED).to_junit()) == {
        "groups_match_topology": [],
        "outputs_match_reference": [],
        "gradients_match_reference": [],
        "gradient_norm_matches_reference": ["skipped"],
    }


def test_a_failed_check_holds_the_text_of_its_findings() -> None:
    document = Report(FAILED).to_junit()
    assert cases(document)["gradients_match_reference"] == ["failure"]
    failures = list(ET.fromstring(document).iter("failure"))
    assert failures[0].get("message") == "model.layers.0.self_attn.q_norm.weight"
    assert "partial_gradient_on_replica: the sum" in (failures[0].text or "")
    assert (failures[1].text or "").count("  where ") == 5


def test_a_finding_of_a_check_without_a_result_is_not_lost() -> None:
    assert cases(Report(replace(FAILED, checks=())).to_junit()) == {
        "gradients_match_reference": ["failure"],
        "gradient_norm_matches_reference": ["failure"],
    }


def test_a_crash_is_an_error_and_control_characters_of_its_message_are_no_xml() -> None:
    document = Report(replace(ERROR, message=f"{ERROR.message}\a")).to_junit()
    assert "?" in document
    assert cases(document) == {"error": ["error"]}
    assert "  not supported\n" in document
    assert 'message="ValueError: style"' in document


def test_several_reports_are_several_suites() -> None:
    suites = ET.fromstring(as_junit([PASSED, FAILED, ERROR, SKIPPED])).findall("testsuite")
    keys = ("name", "tests", "failures", "errors", "skipped", "time")
    assert [tuple(suite.get(key) for key in keys) for suite in suites] == [
        ("qwen3 deepspeed tp=2", "4", "0", "0", "1", "6.123"),
        ("qwen3 deepspeed tp=2 dp=2 zero=1", "3", "2", "0", "0", "7.000"),
        ("phi3 deepspeed tp=2", "1", "0", "1", "0", "3.000"),
        ("llama deepspeed tp=2", "1", "0", "0", "1", "0.000"),
    ]
