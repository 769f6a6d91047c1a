"""Is the norm that clipping uses the reference's, on every rank?"""

from __future__ import annotations

from math import hypot, inf

from tpcheck.numerics.differences import frobenius
from tpcheck.numerics.evidence import CheckOutcome, Evidence, Suspect


def gradient_norm_matches_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare each rank's gradient norm of `step`. Calibrated."""
    expected = evidence.reference[step].gradient_norm
    actual = [part.gradient_norm for part in evidence.candidate[step]]
    name = "gradient norm"
    if expected is None or any(norm is None for norm in actual):
        return CheckOutcome(missed={name: "the backend does not tell the norm by which it clips"})
    norms = [norm for norm in actual if norm is not None]
    allowed = evidence.tolerance.allowed_scalar((step, "norm"), expected)
    errors = [abs(norm - expected) if norm == norm else inf for norm in norms]
    margin = max(errors) / allowed if allowed else (inf if max(errors) else 0.0)
    if max(errors) <= allowed:
        return CheckOutcome({name: margin})
    wrong = tuple(tp_rank for tp_rank, error in enumerate(errors) if error > allowed)
    suspect = Suspect(
        check="gradient_norm_matches_reference",
        kind="norm",
        where={"phase": "update", "step": step, "ranks": evidence.ranks(wrong)},
        observed=max(errors) / expected if expected else max(errors),
        allowed=allowed / expected if expected else allowed,
        evidence={
            "norm_actual": norms,
            "norm_expected": expected,
            "dtype": evidence.dtype,
            "replays": evidence.tolerance.num_replays,
            **norm_hypotheses(evidence, step),
        },
        expected=expected,
        parts=tuple(norms),
        replicated=True,
        allowed_error=allowed,
    )
    return CheckOutcome({name: margin}, (suspect,))


def norm_hypotheses(evidence: Evidence, step: int) -> dict[str, object]:
    """Return the norms that the candidate's own gradients have when they are summed up in the usual wrong ways."""
    sharded, replicated = [], []
    for part in evidence.candidate[step]:
        sizes = {
            name: frobenius(gradient)
            for name, gradient in part.gradients.items()
            if gradient is not None and name in evidence.layouts
        }
        sharded.append(hypot(*(size for name, size in sizes.items() if not evidence.layouts[name].is_replicated)))
        replicated.append(hypot(*(size for name, size in sizes.items() if evidence.layouts[name].is_replicated)))
    return {
        "norm_of_each_rank_alone": [hypot(*both) for both in zip(sharded, replicated, strict=True)],
        "norm_of_each_ranks_shards": sharded,
        "norm_with_replicas_counted": hypot(*sharded, *replicated),
    }
