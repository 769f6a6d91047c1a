"""Why the gradient that a module sends back to its input is wrong although those of its outputs are right."""

from __future__ import annotations

import torch

from tpcheck.causes.explanation import Explanation, Test, num_tp, scaled, scaled_on_some
from tpcheck.causes.gradients import multiple, terms_of_ranks
from tpcheck.causes.mistaken import mistaken
from tpcheck.causes.rounding import dtype_rounded
from tpcheck.records import Suspect


def _of_a_module(test: Test) -> Test:
    """Ask only where a module made the gradient: no collective of a module scales what it is handed."""

    def asked(suspect: Suspect) -> Explanation | None:
        return test(suspect) if str(suspect.where.get("field", "")).startswith("input") else None

    return asked


def vanished(suspect: Suspect) -> Explanation | None:
    """No gradient comes back at all, on the ranks that are wrong."""
    if not suspect.parts or suspect.expected is None or not bool(suspect.expected.any()):
        return None
    return Explanation("gradient_missing", 0.0) if not any(bool(torch.any(part)) for part in suspect.parts) else None


TESTS: tuple[Test, ...] = (
    vanished,
    terms_of_ranks("missing_reduce"),
    _of_a_module(scaled("duplicate_reduce", num_tp)),
    _of_a_module(scaled("mean_instead_of_sum", lambda suspect: 1 / num_tp(suspect))),
    _of_a_module(scaled_on_some("duplicate_reduce", num_tp)),
    _of_a_module(scaled_on_some("mean_instead_of_sum", lambda suspect: 1 / num_tp(suspect))),
    mistaken,
    multiple,
    dtype_rounded,
)
