"""Are the weights and buffers after an optimizer step the reference's?"""

from __future__ import annotations

from dataclasses import replace

from tpcheck.checks.buffers import ComparedBuffer, compare_buffers
from tpcheck.checks.outcome import CheckOutcome
from tpcheck.checks.parameters import ComparedParameter, compare_parameters, parameter_suspect
from tpcheck.checks.suspects import tensor_suspect
from tpcheck.checks.update_fit import fitted_step, with_momentum_of_others
from tpcheck.compare import spacing
from tpcheck.records import Evidence, Suspect
from tpcheck.records.suspect import Mistaken

_OF_ANOTHER_RANK = "the momentum of another rank's shard gives these weights"


def updates_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare every parameter and buffer after `step`. Calibrated."""
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
    suspects = [_weight_suspect(evidence, step, one, len(wrong)) for one in wrong]
    buffers, missed_buffers = compare_buffers(evidence, step)
    suspects.extend(_buffer_suspect(evidence, step, one) for one in buffers if not one.found.agrees)
    margins = {name: one.found.margin for name, one in compared.items()}
    margins |= {one.label: one.found.margin for one in buffers}
    return CheckOutcome(margins, tuple(suspects), {**missed, **missed_buffers})


def _weight_suspect(evidence: Evidence, step: int, one: ComparedParameter, num_wrong: int) -> Suspect:
    suspect = parameter_suspect(
        evidence,
        one,
        check="updates_match_reference",
        kind="update",
        where={"phase": "update", "step": step},
        details={"first_of": num_wrong, **fitted_step(evidence, step, one.name)},
    )
    before = evidence.initial[one.name] if step == 0 else evidence.reference[step - 1].weights[one.name]
    layout = evidence.layouts[one.name]
    if tuple(before.shape) != tuple(layout.shape):
        return suspect
    stale = tuple(layout.local(before, tp_rank) for tp_rank in range(len(suspect.parts)))
    swapped = with_momentum_of_others(evidence, step, one.name)
    return replace(
        suspect,
        mistaken=(
            Mistaken("stale_weight", stale),
            *([Mistaken("shard_order_swapped", swapped, {"note": _OF_ANOTHER_RANK})] if swapped else []),
        ),
    )


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
