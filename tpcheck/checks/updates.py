"""Are the weights and buffers after an optimizer step the reference's?"""

from __future__ import annotations

from tpcheck.checks.buffers import ComparedBuffer, compare_buffers
from tpcheck.checks.outcome import CheckOutcome, named_few
from tpcheck.checks.parameters import compare_parameters, parameter_suspect
from tpcheck.checks.suspects import tensor_suspect
from tpcheck.compare import spacing
from tpcheck.records import Evidence, Suspect


def updates_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare every parameter and buffer after `step`. Calibrated; one finding names all weights, one a buffer."""
    compared, missed = compare_parameters(
        evidence,
        evidence.reference[step].weights,
        [part.weights for part in evidence.candidate[step]],
        lambda name, whole: evidence.tolerance.allowed((step, "weight", name), spacing(whole)),
    )
    differing = [name for name, one in compared.items() if not one.found.agrees]
    for name in (name for name in differing if not _is_trained(evidence, step, name)):
        del compared[name]
        missed[name] = "it has no gradient, and optimizers may decay such a weight or leave it"
    wrong = sorted((one for one in compared.values() if not one.found.agrees), key=lambda one: -one.found.margin)
    suspects = [
        parameter_suspect(
            evidence,
            first,
            check="updates_match_reference",
            kind="update",
            where={"phase": "update", "step": step},
            details={"first_of": len(wrong), "also": named_few(one.name for one in wrong[1:])},
        )
        for first in wrong[:1]
    ]
    buffers, missed_buffers = compare_buffers(evidence, step)
    suspects.extend(_buffer_suspect(evidence, step, one) for one in buffers if not one.found.agrees)
    margins = {name: one.found.margin for name, one in compared.items()}
    margins |= {one.label: one.found.margin for one in buffers}
    return CheckOutcome(margins, tuple(suspects), {**missed, **missed_buffers})


def _buffer_suspect(evidence: Evidence, step: int, one: ComparedBuffer) -> Suspect:
    module = one.name.rpartition(".")[0]
    return tensor_suspect(
        evidence,
        one.found,
        check="updates_match_reference",
        kind="update",
        where={"phase": "update", "step": step, "module": module, "field": one.label},
        expected=one.expected,
        parts=one.placed.parts,
        expected_parts=[one.expected] * len(one.placed.parts),
        replicated=True,
    )


def _is_trained(evidence: Evidence, step: int, name: str) -> bool:
    gradients = [part.gradients[name] for part in evidence.candidate[step]]
    if evidence.reference[step].gradients[name] is not None:
        return True
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)
