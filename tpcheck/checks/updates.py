"""Are the weights and buffers after an optimizer step the reference's?"""

from __future__ import annotations

from dataclasses import replace

import torch

from tpcheck.checks.buffers import ComparedBuffer, compare_buffers
from tpcheck.checks.outcome import CheckOutcome
from tpcheck.checks.parameters import ComparedParameter, compare_parameters, parameter_suspect
from tpcheck.checks.replicas import replicas_differ
from tpcheck.checks.suspects import tensor_suspect
from tpcheck.checks.update_fit import fitted_step, momentum_mistakes
from tpcheck.compare import spacing
from tpcheck.records import Evidence, Suspect
from tpcheck.records.suspect import Mistaken


def updates_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare every parameter and buffer after `step`. Calibrated.

    A recorded call of the model that no optimizer step followed has no weights to compare.
    """
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
    if not evidence.reference[step].weights:
        missed["weights"] = "no optimizer step followed this call"
    return CheckOutcome(margins, tuple(suspects), {**missed, **missed_buffers})


def _weight_suspect(evidence: Evidence, step: int, one: ComparedParameter, num_wrong: int) -> Suspect:
    before = evidence.weights_before(step)[one.name]
    is_unchanged = torch.equal(one.expected, before)
    suspect = parameter_suspect(
        evidence,
        one,
        check="updates_match_reference",
        kind="update",
        where={"phase": "update", "step": step},
        details={
            "first_of": num_wrong,
            **fitted_step(evidence, step, one.name),
            **_of_replicas(evidence, step, "parameter", one.name),
            **({"note": "the reference's weight is the same as before this step"} if is_unchanged else {}),
        },
    )
    layout = evidence.layouts[one.name]
    if tuple(before.shape) != tuple(layout.shape) or is_unchanged:
        return suspect
    stale = tuple(layout.local(before, tp_rank) for tp_rank in range(len(suspect.parts)))
    return replace(suspect, mistaken=(Mistaken("stale_weight", stale), *momentum_mistakes(evidence, step, one.name)))


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
        details=_of_replicas(evidence, step, "buffer", one.name),
    )


def _of_replicas(evidence: Evidence, step: int, kind: str, name: str) -> dict[str, bool]:
    """Return whether replicas over DP differ, and notes on what tells replicas apart that is no drift in this step."""
    over_dp = [evidence.topology.peers(rank, "dp") for rank in evidence.tp_group if kind == "parameter"]
    over_tp = [evidence.tp_group] if kind == "buffer" or evidence.layouts[name].is_replicated else []
    asked = {
        "replicas_over_dp_differ": (step + 1, (kind, name), over_dp),
        "differed_at_start": (0, (kind, name), over_dp + over_tp),
        "gradients_differ": (step + 1, ("gradient", name), over_dp + over_tp),
    }
    return {
        note: True
        for note, (moment, item, groups) in asked.items()
        if any(replicas_differ(evidence, moment, item, group) for group in groups)
    }


def _is_trained(evidence: Evidence, step: int, name: str) -> bool:
    gradients = [part.gradients[name] for part in evidence.candidate[step]]
    if evidence.reference[step].gradients[name] is not None:
        return True
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)
