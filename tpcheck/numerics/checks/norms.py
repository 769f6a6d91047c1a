"""Is the gradient norm that clipping uses the reference's, on every rank?"""

from __future__ import annotations

from math import hypot, inf

from tpcheck.numerics.differences import frobenius
from tpcheck.numerics.evidence import CheckOutcome, Evidence, NormFacts, Suspect


def gradient_norm_matches_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare each rank's gradient norm of `step`. Calibrated."""
    expected = evidence.reference[step].gradient_norm
    actual = [part.gradient_norm for part in evidence.candidate[step]]
    name = "gradient norm"
    if expected is None or any(norm is None for norm in actual):
        return CheckOutcome(not_compared={name: "the backend does not report the norm that it clips by"})
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
        },
        expected=expected,
        actual_parts=tuple(norms),
        is_replicated=True,
        allowed_error=allowed,
        norms=norm_facts(evidence, step),
    )
    return CheckOutcome({name: margin}, (suspect,))


def norm_facts(evidence: Evidence, step: int) -> NormFacts:
    """Return the norms of the candidate's gradients, summed up in the usual wrong ways."""
    sharded, replicated = [], []
    for rank in evidence.candidate[step]:
        sizes = {
            name: frobenius(gradient)
            for name, gradient in rank.gradients.items()
            if gradient is not None and name in evidence.layouts
        }
        sharded.append(hypot(*(size for name, size in sizes.items() if not evidence.layouts[name].is_replicated)))
        replicated.append(hypot(*(size for name, size in sizes.items() if evidence.layouts[name].is_replicated)))
    return NormFacts(
        of_ranks=tuple(map(hypot, sharded, replicated)),
        of_ranks_shards=tuple(sharded),
        counting_replicas=hypot(*sharded, *replicated),
    )
