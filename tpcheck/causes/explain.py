"""Tries every cause on a suspect and keeps the first that explains it exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tpcheck.causes import activations, gradients, groups, input_gradients, norms, replicas, updates, weights
from tpcheck.causes.explanation import Explanation, Test
from tpcheck.causes.finite import loses_numbers, not_finite
from tpcheck.records import Suspect
from tpcheck.records.suspect import Kind


def explain(suspect: Suspect) -> Explanation | None:
    """Return the first cause whose test holds, or None where none does."""
    return next((found for test in applicable(suspect) if (found := test(suspect)) is not None), None)


def applicable(suspect: Suspect) -> tuple[Test, ...]:
    """Return the tests that a suspect is put to, in order."""
    return (not_finite,) if suspect.kind in _COMPUTED and loses_numbers(suspect) else TESTS[suspect.kind]


TESTS: Mapping[Kind, tuple[Test, ...]] = {
    "activation": activations.TESTS,
    "input_gradient": input_gradients.TESTS,
    "gradient": gradients.TESTS,
    "weight": weights.TESTS,
    "update": updates.TESTS,
    "norm": norms.TESTS,
    "replica": replicas.TESTS,
    "group": groups.OF_GROUPS,
    "sharding": groups.OF_SHARDING,
}

_COMPUTED: Collection[Kind] = ("activation", "input_gradient", "gradient", "update")  # weights are told by their bits
