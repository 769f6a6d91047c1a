"""Compares the gradients that modules fed what the reference's were make of their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpcheck.checks.parameters import ComparedParameter, compare_parameters
from tpcheck.compare import distance_of_terms, own_rounding
from tpcheck.records import Evidence


def gradients_alone(alone: Evidence) -> dict[str, ComparedParameter]:
    """Compare, of the modules run one by one, each gradient that every rank made as its shard lies.

    Nothing is reduced after such a pass: ranks may hold terms of the gradient of a replicated parameter. What adds up
    to the expected one is left out, for nobody can say whether it would have been reduced.
    """
    expected = dict(_made_everywhere(alone))
    compared, _ = compare_parameters(
        alone,
        expected,
        [one.gradients for one in alone.candidate[0]],
        lambda name, whole: alone.tolerance.allowed((0, alone.dp_rank, "gradient", name), own_rounding(whole)),
    )
    return {name: one for name, one in compared.items() if not _adds_up(alone, one)}


def _made_everywhere(alone: Evidence) -> Iterator[tuple[str, Any]]:
    for name, whole in alone.reference[0].gradients.items():
        layout = alone.layouts.get(name)
        made = [one.gradients.get(name) for one in alone.candidate[0]]
        shapes = [None if one is None else tuple(one.shape) for one in made]
        if whole is not None and layout is not None and shapes == list(layout.local_shapes):
            yield name, whole


def _adds_up(alone: Evidence, one: ComparedParameter) -> bool:
    if one.found.agrees or not alone.layouts[one.name].is_replicated:
        return False
    return distance_of_terms(one.parts, one.expected) <= one.found.allowed
