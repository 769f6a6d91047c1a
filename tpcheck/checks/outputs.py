"""Is every module's output the reference's, and the loss?"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch

from tpcheck.checks.activations import ComparedActivation, ComparedActivations, compare_activations
from tpcheck.checks.localise import comes_out, first_divergences, is_inside, scope_of
from tpcheck.checks.outcome import CheckOutcome
from tpcheck.checks.suspects import tensor_suspect
from tpcheck.records import Evidence, Suspect, TensorKey

_CHECK = "outputs_match_reference"


def outputs_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare the activations and the loss of `step`; name each module that is wrong although its inputs agree.

    Calibrated.
    """
    activations = compare_activations(evidence, step, "forward")
    events = list(activations.compared)
    wrong = {one.key for one in activations.wrong()}
    roots = first_divergences(events, wrong.__contains__)
    suspects = [_root_suspect(evidence, step, activations, root, len(wrong)) for root in roots]
    loss_margin, loss_suspects = _compare_loss(evidence, step)
    margins = {**activations.margins(), "loss": loss_margin}
    return CheckOutcome(margins, tuple(suspects or loss_suspects), activations.missed)


def activation_suspect(
    evidence: Evidence, step: int, one: ComparedActivation, check: str, details: dict[str, Any], module: str
) -> Suspect:
    """Return the suspect for one activation, laid at the door of `module`."""
    field = f"{one.key.role} {one.key.path}"
    if module != one.key.module:
        field += f" of {one.key.module}"
    where = {"phase": one.key.phase, "step": step, "module": module, "field": field}
    return tensor_suspect(
        evidence,
        one.found,
        check=check,
        kind="activation",
        where=where,
        expected=one.expected,
        parts=one.placed.parts,
        expected_parts=[one.placed.expected_part(one.expected, tp) for tp in range(len(one.placed.parts))],
        replicated=one.placed.is_replicated,
        details=details,
    )


def _root_suspect(
    evidence: Evidence, step: int, activations: ComparedActivations, root: TensorKey, num_wrong: int
) -> Suspect:
    one = activations.compared[root]
    details: dict[str, Any] = {"first_of": num_wrong, "inputs_agree": True}
    scope = scope_of(root, {key.module for key in activations.compared})
    fused = None if comes_out(root) else _fused_before(list(activations.compared.values()), root, scope)
    if fused is not None:
        details["fused_blocks"] = fused.placed.num_blocks
        details["fused_blocks_error"] = fused.found.relative
        details["note"] = f"its output agrees block by block, but what {root.module} then reads from it is wrong"
        return activation_suspect(evidence, step, one, _CHECK, details, module=fused.key.module)
    if not comes_out(root):
        details["note"] = f"what {root.module} is given is wrong, though all that came before it agrees"
    return activation_suspect(evidence, step, one, _CHECK, details, module=scope)


def _fused_before(events: Sequence[ComparedActivation], root: TensorKey, scope: str) -> ComparedActivation | None:
    """Return the last output before `root`, in the module around it, that is cut block by block."""
    found = None
    for one in events:
        if one.key == root:
            break
        if one.placed.is_fused and one.key.role == "output" and is_inside(one.key.module, scope):
            found = one
    return found


def _compare_loss(evidence: Evidence, step: int) -> tuple[float, list[Suspect]]:
    expected = evidence.reference[step].loss
    losses = [part.loss for part in evidence.candidate[step]]
    allowed = evidence.tolerance.allowed_scalar((step, evidence.dp_rank, "loss"), expected)
    errors = [abs(loss - expected) if loss == loss else inf for loss in losses]
    margin = max(errors) / allowed if allowed else (inf if max(errors) else 0.0)
    if margin <= 1:
        return margin, []
    wrong = tuple(tp_rank for tp_rank, error in enumerate(errors) if error > allowed)
    suspect = Suspect(
        check=_CHECK,
        kind="activation",
        where={"phase": "forward", "step": step, "field": "loss", "ranks": evidence.ranks(wrong)},
        observed=max(errors) / abs(expected) if expected else max(errors),
        allowed=allowed / abs(expected) if expected else allowed,
        evidence={
            "loss_actual": losses,
            "loss_expected": expected,
            "dtype": evidence.dtype,
            "replays": evidence.tolerance.num_replays,
        },
        expected=torch.tensor(expected, dtype=torch.float64),
        parts=tuple(torch.tensor(loss, dtype=torch.float64) for loss in losses),
        expected_parts=(torch.tensor(expected, dtype=torch.float64),) * len(losses),
        replicated=True,
        allowed_error=allowed,
    )
    return margin, [suspect]
