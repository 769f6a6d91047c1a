"""The model as a few lines: the path to the first wrong module is opened, what is fine is folded."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest

from tests.report.examples import GRADIENT, PASSED
from tpcheck.core.check_names import ON_REQUEST
from tpcheck.core.findings import Finding, ModuleMargins, Verdict
from tpcheck.report.model_tree import MOST_LINES, ModelTree, is_wrong, model_table
from tpcheck.report.table import table_lines
from tpcheck.report.tree import joined, tree_of
from tpcheck.report.words import as_text

PARTS = ("self_attn", "self_attn.q_proj", "self_attn.q_norm", "mlp", "mlp.up_proj")


def modules(num_layers: int = 2, **wrong: float) -> tuple[ModuleMargins, ...]:
    """Return the margins of a model; `wrong` has backward margins by name."""
    layers = [f"model.layers.{layer}" for layer in range(num_layers)]
    names = ["model.embed_tokens", *(name for layer in layers for name in (layer, *(f"{layer}.{p}" for p in PARTS)))]
    return tuple(ModuleMargins(name, 0.125, wrong.get(name, 0.25)) for name in [*names, "model", "lm_head", ""])


def lines(verdict: Verdict) -> str:
    return as_text(table_lines(model_table(verdict)))


def test_a_model_without_a_mistake_is_folded_to_its_layers() -> None:
    assert (
        lines(replace(PASSED, modules=modules()))
        == """\
  module             forward  backward
  (the whole model)    0.125      0.25
    model              0.125      0.25
      embed_tokens     0.125      0.25
      layers.{0-1}     0.125      0.25  worst of 12 modules
    lm_head            0.125      0.25
"""
    )


def test_margins_of_weights_are_shown_where_runs_were_compared() -> None:
    margins = tuple(replace(each, weights=0.5) for each in modules() if each.module)
    assert (
        lines(replace(PASSED, modules=margins))
        == """\
  module             forward  backward  weights
  (the whole model)        -         -        -
    model              0.125      0.25      0.5
      embed_tokens     0.125      0.25      0.5
      layers.{0-1}     0.125      0.25      0.5  worst of 12 modules
    lm_head            0.125      0.25      0.5
"""
    )


@pytest.mark.parametrize("check", ON_REQUEST)
def test_what_is_saved_resumed_or_drawn_wrong_does_not_mark_the_module_that_computes_right(check: str) -> None:
    failed = replace(PASSED, verdict="failed", findings=(replace(GRADIENT, check=check),), modules=modules())
    assert lines(failed) == lines(replace(PASSED, modules=modules()))
    in_training = replace(failed, findings=(replace(GRADIENT, check="updates_match_reference"),))
    assert "first wrong" in lines(in_training)


def test_the_path_to_the_first_wrong_module_is_opened() -> None:
    wrong = "model.layers.0.self_attn.q_norm"
    margins = modules(**{wrong: 2e12, "model.layers.1.self_attn.q_norm": 3e12})
    assert (
        lines(replace(PASSED, verdict="failed", findings=(GRADIENT,), modules=margins))
        == """\
  module             forward  backward
  (the whole model)    0.125      0.25
    model              0.125      0.25
      embed_tokens     0.125      0.25
      layers.0         0.125      0.25
        self_attn      0.125      0.25
          q_proj       0.125      0.25
          q_norm       0.125   2.0e+12  first wrong
        mlp            0.125      0.25  worst of 2 modules
      layers.1         0.125   3.0e+12  1 of 6 modules wrong
    lm_head            0.125      0.25
"""
    )


def test_a_deep_model_takes_as_few_lines() -> None:
    passed = replace(PASSED, modules=modules(80))
    assert "layers.{0-79}" in lines(passed)
    failed = replace(PASSED, verdict="failed", findings=(GRADIENT,), modules=modules(80))
    assert "layers.{1-79}" in lines(failed)
    assert all(len(lines(verdict).splitlines()) <= MOST_LINES for verdict in (passed, failed))


def test_a_module_whose_margin_is_infinite_is_wrong() -> None:
    verdict = replace(PASSED, modules=(ModuleMargins("a", inf, None), ModuleMargins("b"), ModuleMargins("", 0.0)))
    assert (
        lines(verdict)
        == """\
  module             forward  backward
  (the whole model)        0         -
    a                    inf         -  wrong
    b                      -         -
"""
    )


def test_a_finding_of_no_module_opens_nothing() -> None:
    finding = Finding("groups_match_topology", {"phase": "start", "field": "tp group"}, 1.0, 0.0)
    tree = ModelTree.of(replace(PASSED, findings=(finding,), modules=modules()))
    assert (tree.first_wrong, tree.wrong) == (None, frozenset())


def test_a_report_without_steps_shows_no_model() -> None:
    assert model_table(PASSED).rows == ()


def test_names_above_a_single_other_one_are_joined() -> None:
    root = joined(tree_of({"a.b.weight": 1, "a.c.weight": 2, "a.c.bias": 3}))
    assert [node.name for node in root.walk()] == ["", "a", "b.weight", "c", "weight", "bias"]


def test_a_margin_that_is_no_number_is_wrong() -> None:
    assert [is_wrong(margin) for margin in (nan, inf, 1.0, 0.0, None)] == [True, True, False, False, False]
