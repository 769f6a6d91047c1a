"""A verdict reads the same on a terminal and pasted into an issue."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from tests.report.examples import ERROR, FAILED, GRADIENT, NORM, PASSED, REPLICAS, SKIPPED
from tpcheck.core.findings import CheckResult
from tpcheck.report.report import Report


def test_a_run_that_passed_shows_what_was_compared() -> None:
    assert (
        Report(PASSED).to_text()
        == """\
passed  qwen3  deepspeed, tp=2, float64, 2 steps, seed 0

  check                            verdict  compared  worst margin  at
  groups_match_topology            passed          4             0
  outputs_match_reference          passed         96         0.113  step 1 model.layers.0.mlp
  gradients_match_reference        passed         46       2.5e-05  step 0 model.norm.weight
  gradient_norm_matches_reference  nothing         0

  coverage  146 of 151 tensors compared
            not compared, it has no output: a, b, d and 1 more
            not compared, its placement is not known: c
  versions  deepspeed 0.19.8, torch 2.13.0, transformers 5.23.0
  seconds   6.1
"""
    )


def test_a_run_that_failed_shows_its_first_findings_and_counts_the_others() -> None:
    text = Report(FAILED).to_text(findings=1)
    assert (
        text
        == """\
failed  qwen3  deepspeed, tp=2, dp=2, zero=1, float64, 2 steps, seed 0, qk_layernorm, head_dim=8, ignore_plan

gradients_match_reference  model.layers.0.self_attn.q_norm.weight
  where     deepspeed, tp=2, dp=2, zero=1, backward of step 0; first wrong tensor of 4; inputs of the module agree
  observed  relative error 8.2e-01 (largest 6.6e-02 at [6]) on ranks 0, 1
  allowed   4.2e-14 (float64, 8 perturbed replays); margin 2.0e+13
  cause     partial_gradient_on_replica: the sum of the ranks' gradients equals the expected one to 1.8e-15
  again     tpcheck verify qwen3 --tp 2 --ignore-plan

and 5 more; --json has them all

  check                            verdict  compared  worst margin  at
  outputs_match_reference          passed         96           0.1
  gradients_match_reference        failed         46       2.0e+13  model.layers.0.self_attn.q_norm.weight
  gradient_norm_matches_reference  failed          2           inf  gradient norm

  coverage  144 of 144 tensors compared
  versions  deepspeed 0.19.8, torch 2.13.0, transformers 5.23.0
  seconds   7.0
  read on   https://github.com/tpcheck/tpcheck/tree/main/docs/guides/loss-differs.md
"""
    )


def test_five_findings_are_shown_unless_all_are_asked_for() -> None:
    assert Report(FAILED).to_text().count("  where ") == 5
    assert Report(FAILED).to_text(findings=None).count("  where ") == 6
    assert "more; --json" not in Report(FAILED).to_text(findings=None)


def test_the_first_finding_of_every_check_is_shown_before_more_of_one() -> None:
    report = Report(replace(FAILED, findings=(NORM, NORM, GRADIENT, REPLICAS, NORM)))
    text = report.to_text(findings=4).partition("  check ")[0]
    shown = [line.split()[0] for line in text.splitlines()[1:] if line and line[0] not in " a"]
    assert shown == [*["gradient_norm_matches_reference"] * 2, "gradients_match_reference", "replicas_agree"]


def test_a_finding_that_follows_from_another_is_shown_last() -> None:
    consequence = replace(NORM, cause=None, evidence={**NORM.evidence, "follows_from": GRADIENT.check})
    report = Report(replace(FAILED, findings=(GRADIENT, GRADIENT, consequence)))
    text = report.to_text(findings=2).partition("  check ")[0]
    assert text.count("gradients_match_reference  model") == 2
    assert "gradient_norm_matches_reference" not in text


def test_an_exact_check_that_failed_has_no_bound_to_its_margin() -> None:
    report = Report(replace(FAILED, findings=(REPLICAS,), checks=(CheckResult("replicas_agree", 36, 0.0),)))
    assert "  replicas_agree  failed         36           inf\n" in report.to_text()


def test_a_backend_s_configuration_is_shown_as_it_is_written() -> None:
    report = Report(replace(PASSED, subject={**PASSED.subject, "config": {"tp": {"size": True}}}))
    assert report.to_text().splitlines()[0].endswith(', seed 0, config={"tp": {"size": true}}')


def test_a_crash_of_the_system_under_test_shows_its_own_message_without_its_colours() -> None:
    assert (
        Report(ERROR).to_text()
        == """\
error  phi3  deepspeed, tp=2, float64, 2 steps, seed 0

The system under test crashed. Its own message:
  ValueError: style
    not supported

  versions  deepspeed 0.19.8, torch 2.13.0, transformers 5.23.0
  seconds   3.0
  read on   https://github.com/tpcheck/tpcheck/tree/main/docs/guides/which-models.md
"""
    )


def test_a_skipped_run_shows_the_reason() -> None:
    assert (
        Report(SKIPPED).to_text()
        == """\
skipped  llama  deepspeed, tp=2, float64, 2 steps, seed 0

Nothing was run:
  two ranks need two GPUs

  seconds   0.0
"""
    )


def test_a_terminal_shows_the_same_words_in_colour() -> None:
    wide = Console(force_terminal=True, color_system="standard", width=200)
    with wide.capture() as capture:
        wide.print(Report(FAILED))
    assert "\x1b[" in capture.get()
    plain = Console(width=200)
    with plain.capture() as capture:
        plain.print(Report(FAILED))
    shown = [line.rstrip() for line in capture.get().splitlines()]
    assert shown == Report(FAILED).to_text().splitlines()


def test_square_brackets_are_not_taken_for_markup() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(Report(FAILED))
    assert "at [6])" in capture.get()
