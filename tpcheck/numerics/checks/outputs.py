"""Is every module's output the reference's, and the loss?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import torch

from tpcheck.numerics.checks.activations import (
    ComparedActivation,
    ComparedActivations,
    comes_out,
    compare_activations,
    first_divergences,
    is_inside,
    scope_of,
)
from tpcheck.numerics.checks.linear import Products, linear_hypotheses, own_parts, products
from tpcheck.numerics.checks.suspects import tensor_suspect, unlike_own
from tpcheck.numerics.checks.vocabulary import embedding_hypotheses, loss_hypotheses
from tpcheck.numerics.evidence import CheckOutcome, Collective, Evidence, Hypothesis, Suspect, TensorKey

Issued = tuple[tuple[str, tuple[int, ...]], ...]  # (name, global ranks) in order


def unlike_its_kind(evidence: Evidence, step: int, module: str) -> dict[str, Any]:
    """Return what a module issued on the ranks, where that is not what most modules of its kind issued; else nothing.

    Modules are of one kind if their names differ in the number of the layer alone.
    """
    by_rank = [_by_module(part.collectives) for part in evidence.candidate[step]]
    own = [issued.get(module, ()) for issued in by_rank]
    names = {key.module for key in evidence.reference[step].activations}
    like = sorted(name for name in names if name != module and _kind(name) == _kind(module))
    votes = Counter(issued.get(name, ()) for name in like for issued in by_rank)
    if votes:
        expected = votes.most_common(1)[0][0]
        as_in = "in " + next(name for name in like if any(issued.get(name, ()) == expected for issued in by_rank))
    else:
        expected = Counter(own).most_common(1)[0][0]
        as_in = "on the other ranks"
    if all(issued == expected for issued in own):
        return {}
    different = next(issued for issued in own if issued != expected)
    return {"collectives": _told(different), "collectives_expected": _told(expected), "collectives_as_in": as_in}


def _by_module(collectives: tuple[Collective, ...]) -> Mapping[str, Issued]:
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for one in collectives:
        found.setdefault(one.module, []).append((one.name, one.ranks))
    return {module: tuple(issued) for module, issued in found.items()}


def _told(issued: Issued) -> list[dict[str, Any]]:
    return [{"name": name, "ranks": list(ranks)} for name, ranks in issued]


def _kind(module: str) -> str:
    return re.sub(r"\d+", "#", module)


_CHECK = "outputs_match_reference"


def outputs_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare the activations and the loss of `step`; name each module that is wrong although its inputs agree.

    Linear modules further on, whose inputs are wrong in consequence, are held against what their own inputs and weights
    give: so that one fault does not hide another. Where precision is low, each module is held against the reference on
    the reference's own inputs, too: what that shows goes before what a whole pass shows. Calibrated.
    """
    activations = compare_activations(evidence, step, "forward")
    suspects = _suspects(evidence, step, activations)
    loss_margin, loss_suspects = _compare_loss(evidence, step, activations)
    margins = {**activations.margins(), "loss": loss_margin}
    outcome = CheckOutcome(margins, tuple(suspects or loss_suspects), activations.missed)
    alone = None if step else evidence.alone()
    return outcome if alone is None else _sharpened(outcome, alone)


def _suspects(evidence: Evidence, step: int, activations: ComparedActivations) -> list[Suspect]:
    wrong = {one.key for one in activations.wrong()}
    roots = first_divergences(list(activations.compared), wrong.__contains__)
    suspects = [_root_suspect(evidence, step, activations, root, len(wrong)) for root in roots]
    return [*suspects, *_independent(evidence, step, activations, roots)]


def _sharpened(outcome: CheckOutcome, alone: Evidence) -> CheckOutcome:
    """Return the outcome with what the modules show one by one."""
    activations = compare_activations(alone, 0, "forward")
    return outcome.sharpened(activations.margins(), _suspects(alone, 0, activations))


def activation_suspect(
    evidence: Evidence,
    step: int,
    one: ComparedActivation,
    check: str,
    details: Mapping[str, Any],
    module: str,
    hypotheses: Sequence[Hypothesis] = (),
) -> Suspect:
    """Return the suspect for one activation, laid at the door of `module`."""
    suspect = tensor_suspect(
        evidence,
        one.found,
        check=check,
        kind="activation",
        where=_where(one, step, module),
        expected=one.expected,
        parts=one.placed.parts,
        expected_parts=[one.placed.expected_part(one.expected, tp) for tp in range(len(one.placed.parts))],
        replicated=one.placed.is_replicated,
        details=details,
    )
    return replace(suspect, hypotheses=tuple(hypotheses))


def _where(one: ComparedActivation, step: int, module: str) -> dict[str, Any]:
    field = f"{one.key.role} {one.key.path}"
    if module != one.key.module:
        field += f" of {one.key.module}"
    return {"phase": one.key.phase, "step": step, "module": module, "field": field}


def _root_suspect(
    evidence: Evidence, step: int, activations: ComparedActivations, root: TensorKey, num_wrong: int
) -> Suspect:
    one = activations.compared[root]
    details: dict[str, Any] = {"first_of": num_wrong, "inputs_agree": True}
    if one.is_again:
        details["note"] = "right when it is first computed, wrong when activation checkpointing computes it again"
    scope = scope_of(root, {key.module for key in activations.compared})
    fused = None if comes_out(root) else _fused_before(list(activations.compared.values()), root, scope)
    if fused is not None:
        details["fused_blocks"] = fused.placed.num_blocks
        details["fused_blocks_error"] = fused.found.relative
        details["note"] = f"its output agrees block by block, but what {root.module} then reads from it is wrong"
        return activation_suspect(evidence, step, one, _CHECK, details, module=fused.key.module)
    if not comes_out(root):
        details["note"] = f"what {root.module} is given is wrong, though all that came before it agrees"
    else:
        details |= unlike_its_kind(evidence, step, root.module)
    is_loss = one.key.module == "" and one.expected.dim() == 0
    hypotheses = tuple(loss_hypotheses(evidence, step, activations) if is_loss else _hypotheses(evidence, step, one))
    return activation_suspect(evidence, step, one, _CHECK, details, module=scope, hypotheses=hypotheses)


def _hypotheses(evidence: Evidence, step: int, one: ComparedActivation) -> Iterator[Hypothesis]:
    if one.key.role != "output":
        return
    made = products(evidence, step, one.key, one.found.allowed)
    if made is not None:
        yield from linear_hypotheses(made, one.placed.parts, one.expected, one.found.allowed)
    else:
        yield from embedding_hypotheses(evidence, step, one)


def _fused_before(events: Sequence[ComparedActivation], root: TensorKey, scope: str) -> ComparedActivation | None:
    """Return the last output before `root`, in the module around it, that is cut block by block."""
    found = None
    for one in events:
        if one.key == root:
            break
        if one.placed.is_fused and one.key.role == "output" and is_inside(one.key.module, scope):
            found = one
    return found


def _independent(
    evidence: Evidence, step: int, activations: ComparedActivations, roots: Sequence[TensorKey]
) -> Iterator[Suspect]:
    """Yield the modules with wrong inputs that do not even make of these what they should: linear ones, and leaves."""
    for one in activations.wrong():
        if one.key in roots:
            continue
        made = products(evidence, step, one.key, one.found.allowed)
        own = _own(evidence, step, one, made)
        if own is None:
            continue
        suspect = unlike_own(
            evidence,
            one.placed.parts,
            own,
            one.found,
            check=_CHECK,
            kind="activation",
            where=_where(one, step, one.key.module),
            replicated=one.placed.is_replicated,
            details=unlike_its_kind(evidence, step, one.key.module),
        )
        if suspect is not None:
            told = () if made is None else linear_hypotheses(made, one.placed.parts, own[0], suspect.allowed_error)
            yield replace(suspect, hypotheses=tuple(told))


def _own(
    evidence: Evidence, step: int, one: ComparedActivation, made: Products | None
) -> Sequence[torch.Tensor] | None:
    """Return what each rank's part should be for the ranks' own inputs; None where that cannot be told."""
    if made is not None:
        return own_parts(made, [part.shape for part in one.placed.parts])
    remade = None if step else evidence.remade.get(one.key)
    shapes = [part.shape for part in one.placed.parts]
    return remade if remade is not None and [part.shape for part in remade] == shapes else None


def _compare_loss(evidence: Evidence, step: int, activations: ComparedActivations) -> tuple[float, list[Suspect]]:
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
        hypotheses=tuple(loss_hypotheses(evidence, step, activations)),
    )
    return margin, [suspect]
