"""Are the gathered weights the reference's, to the bit, before the first step?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tpcheck.checks.outcome import CheckOutcome
from tpcheck.checks.parameters import ComparedParameter, compare_parameters, parameter_suspect
from tpcheck.records import Evidence, Suspect

_CHECK = "weights_match_reference"


def weights_match_reference(evidence: Evidence) -> CheckOutcome:
    """Compare every parameter's shards with the reference's parameter. Exact; each wrong one is a suspect."""
    compared, missed = compare_parameters(evidence, evidence.initial, evidence.initial_parts, lambda name, whole: 0.0)
    wrong = [one for one in compared.values() if not one.found.agrees]
    suspects = tuple(_suspect(evidence, one, compared, len(wrong)) for one in wrong)
    return CheckOutcome({name: one.found.margin for name, one in compared.items()}, suspects, missed)


def _suspect(
    evidence: Evidence, one: ComparedParameter, compared: Mapping[str, ComparedParameter], num_wrong: int
) -> Suspect:
    beside = [other for other in compared.values() if other.name != one.name and _around(other) == _around(one)]
    wrong, right = ([other.name for other in beside if other.found.agrees is agrees] for agrees in (False, True))
    details: dict[str, Any] = {"first_of": num_wrong}
    if wrong and right:
        details["beside_it"] = {"wrong": wrong, "right": right}
    suspect = parameter_suspect(evidence, one, check=_CHECK, kind="weight", where={"phase": "start"}, details=details)
    layout = evidence.layouts[one.name]
    complete = all(tuple(part.shape) == shape for part, shape in zip(one.parts, layout.local_shapes, strict=True))
    return replace(
        suspect,
        actual=layout.assemble(one.parts) if complete and not layout.is_replicated else None,
        others={
            name: (other.expected, *other.expected_parts)
            for name, other in compared.items()
            if name != one.name and other.expected_parts
        },
    )


def _around(one: ComparedParameter) -> str:
    """Return the module around the one that owns the parameter."""
    return one.module.rpartition(".")[0]
