"""Tries every cause on a suspect and keeps the first that explains it exactly."""

from __future__ import annotations

from collections.abc import Mapping

from tpcheck.causes import activations, gradients, groups, input_gradients, norms, replicas, updates, weights
from tpcheck.causes.explanation import Explanation, Test
from tpcheck.records import Suspect
from tpcheck.records.suspect import Kind


def explain(suspect: Suspect) -> Explanation | None:
    """Return the first cause whose test holds, or None where none does."""
    return next((found for test in TESTS[suspect.kind] if (found := test(suspect)) is not None), None)


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
