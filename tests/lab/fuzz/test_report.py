"""The text and JSON of a search, line by line."""

from __future__ import annotations

from tests.lab.fuzz.fuzz_examples import ERROR, FAILED, KNOWN, LAYER, NO, NOT_TRIED, PASSED, WRONG
from tests.schema import document
from tpcheck.lab.fuzz.report import (
    layers_data,
    layers_lines,
    outcome_line,
    searched_data,
    searched_json,
    searched_lines,
)
from tpcheck.report.words import as_text


def test_a_search_without_findings_shows_what_it_covered() -> None:
    assert as_text(searched_lines(PASSED)) == (
        "passed  qwen3  deepspeed\n"
        "\n"
        "  examples  3 ran: 2 passed, 1 known; 1 refused\n"
        "  known     deepspeed-bf16-norm (1 example); tpcheck/lab/known.toml\n"
        "  refused   1 x N heads do not fit\n"
        "  seconds   12.3\n"
    )


def test_a_finding_shows_the_example_that_it_was_shrunk_from() -> None:
    text = as_text(searched_lines(FAILED))
    assert text.startswith("failed  qwen3  deepspeed\n\n")
    assert "gradients_match_reference  model.layers.0.self_attn.q_norm.weight\n" in text
    assert "  shrunk    from tpcheck verify qwen3 --tp 4 --dp 2 --batch 3x7 --ignore-plan\n" in text
    assert text.endswith(
        "  examples  2 ran: 1 passed, 1 failed; 2 refused; 9 more to shrink\n"
        "  refused   2 x N heads do not fit\n"
        "  seconds   20.0\n"
    )


def test_a_crash_shows_its_message_and_the_limits_of_its_example() -> None:
    text = as_text(searched_lines(ERROR))
    assert text.startswith("error  qwen3  deepspeed\n")
    assert "The system under test crashed. Its own message:\n" in text
    assert "  again     tpcheck verify qwen3 --tp 4\n" in text
    assert "            shrinking reached its time limit: a smaller example may exist\n" in text
    assert "            it passed when it was run again: the outcome is not deterministic\n" in text


def test_layers_are_a_table_and_their_findings() -> None:
    assert as_text(layers_lines([LAYER, NOT_TRIED])) == (
        "failed   LinearLayer  2 ran: 1 passed, 1 failed\n"
        "skipped  LmHead       no gradient\n"
        "\n"
        "failed  LinearLayer: gradient of the input is off by 1.0e+00 on ranks [1]; missing_reduce\n"
        '  again     tpcheck fuzz --layers --trial \'{"layer": "LinearLayer", "inputs": 2}\'\n'
    )


def test_each_example_is_a_line() -> None:
    assert str(outcome_line(WRONG)) == f"failed   {WRONG.command}  a gradient is wrong"
    assert str(outcome_line(WRONG, shrinking=True)) == f"shrink  failed   {WRONG.command}  a gradient is wrong"
    assert str(outcome_line(KNOWN)) == f"known    deepspeed-bf16-norm  {KNOWN.command}"
    assert str(outcome_line(NO)) == "refused    N heads do not fit"


def test_json_holds_the_report_of_the_smallest() -> None:
    data = document(searched_json(searched_data(FAILED)), "fuzz")
    (found,) = data["findings"]
    assert found["report"]["verdict"] == "failed"
    assert data["coverage"]["ran"] == 2
    of_layers = document(searched_json(layers_data([LAYER, NOT_TRIED])), "fuzz_layers")
    assert of_layers["layers"][0]["findings"][0]["report"]["cause"] == "missing_reduce"
