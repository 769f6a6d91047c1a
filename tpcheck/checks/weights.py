"""Are the gathered weights the reference's, to the bit, before the first step?"""

from __future__ import annotations

from tpcheck.checks.outcome import CheckOutcome, named_few
from tpcheck.checks.parameters import compare_parameters, parameter_suspect
from tpcheck.records import Evidence


def weights_match_reference(evidence: Evidence) -> CheckOutcome:
    """Compare every parameter's shards with the reference's parameter. Exact; one finding names them all."""
    compared, missed = compare_parameters(evidence, evidence.initial, evidence.initial_parts, lambda name, whole: 0.0)
    wrong = [one for one in compared.values() if not one.found.agrees]
    suspects = [
        parameter_suspect(
            evidence,
            first,
            check="weights_match_reference",
            kind="weight",
            where={"phase": "start"},
            details={"first_of": len(wrong), "also": named_few(one.name for one in wrong[1:])},
        )
        for first in wrong[:1]
    ]
    return CheckOutcome({name: one.found.margin for name, one in compared.items()}, tuple(suspects), missed)
