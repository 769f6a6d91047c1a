"""What is known of a wrong gradient: collectives that it passes through, what each use of a module adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tpcheck.numerics.activation_placement import PlacedTensor
from tpcheck.numerics.checks.recompute import gradient_product
from tpcheck.numerics.checks.suspects import ComparedParameter
from tpcheck.numerics.data_flow import collectives_behind, consumers, in_phase, is_exchanged_before, is_result
from tpcheck.numerics.differences import frobenius, frobenius_distance
from tpcheck.numerics.evidence import BackwardFacts, Evidence, TensorKey
from tpcheck.numerics.tolerance import FITTED_RELATIVE_ERROR, MOST_USES, RECOMPUTED_FACTOR

Activations = Mapping[TensorKey, Any]


def collectives_passed(evidence: Evidence, step: int, key: TensorKey, *, unseen: bool = False) -> tuple[str, ...]:
    """Return the collectives, on every rank, of what a gradient passes through.

    That is the module; and where the gradient is what the module receives, also what stands behind its output.

    Args:
        unseen: Only those that autograd does not see.
    """
    by_rank = []
    for tp_rank, rank in enumerate(evidence.candidate[step]):
        of_module = (each for each in rank.collectives if each.phase == "forward" and each.module == key.module)
        behind = collectives_behind(evidence, step, in_phase(key, "forward"), tp_rank, key.module)[1]
        issued = [*of_module, *(() if is_result(key) else behind)]
        by_rank.append([each.name for each in issued if each.bypasses_autograd or not unseen])
    return tuple(by_rank[0]) if all(by_rank) else ()


def backward_facts(evidence: Evidence, step: int, key: TensorKey, placed: PlacedTensor) -> BackwardFacts:
    """Return what would come back without the collectives that are issued, and which part through which sum."""
    tp = len(placed.parts)
    facts = BackwardFacts(
        collectives_passed(evidence, step, key),
        collectives_passed(evidence, step, key, unseen=True),
        sums_backward=is_exchanged_before(evidence, step, key),
        branches=_branches(evidence, step, key, placed),
    )
    if not facts.collectives:
        return facts
    if is_result(key) and key.path == "0":
        inputs, outputs, output_gradients = _one_in_one_out(evidence, step, key)
        facts = replace(facts, inputs=inputs, outputs=outputs, output_gradients=output_gradients)
    through_sum = _through_sum(evidence.reference[step].activations, key)
    if through_sum is None:
        return facts
    return replace(facts, through_sum=tuple(placed.expected_part(through_sum, tp_rank) for tp_rank in range(tp)))


def _branches(
    evidence: Evidence, step: int, key: TensorKey, placed: PlacedTensor
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return each rank's part of what comes back through each consumer of a tensor that has several."""
    reference = evidence.reference[step].activations
    expected, taken, modules = reference[key], {}, []
    for after in consumers(evidence, step, in_phase(key, "forward")):
        gradient = reference.get(in_phase(after, "backward"))
        if gradient is None or gradient.shape != expected.shape:
            return {}  # it is computed from the tensor, and no view of it: what comes back through it is unknown
        if after.role == "input" and after.module != key.module:
            taken[after.place] = gradient
            modules.append(after.module)
    rest = expected - sum(taken.values()) if taken else expected
    if frobenius(rest) > FITTED_RELATIVE_ERROR * frobenius(expected):
        taken[f"a path past {' and '.join(dict.fromkeys(modules))}, such as a residual"] = rest
    if not 1 < len(taken) <= MOST_USES:
        return {}
    return {
        name: tuple(placed.expected_part(gradient, tp_rank) for tp_rank in range(len(placed.parts)))
        for name, gradient in taken.items()
    }


def _one_in_one_out(evidence: Evidence, step: int, key: TensorKey) -> tuple[tuple[Any, ...], ...]:
    """Return each rank's input, output and output gradient of a module that has one of each, all of one shape."""
    inputs, outputs = (replace(key, phase="forward", role=role, path="0") for role in ("input", "output"))
    keys = [inputs, outputs, in_phase(outputs, "backward")]
    recorded = [[rank.activations.get(each) for rank in evidence.candidate[step]] for each in keys]
    shapes = [[getattr(part, "shape", None) for part in of_key] for of_key in recorded]
    if None in shapes[0] or any(other != shapes[0] for other in shapes):
        return (), (), ()
    return tuple(tuple(part.double() for part in of_key if part is not None) for of_key in recorded)


def _through_sum(reference: Activations, key: TensorKey) -> torch.Tensor | None:
    """Return the part of the gradient of logits that goes through the logarithm of the sum of exponentials.

    Of a cross entropy that is the softmax times the weight of the position; the rest is constant but for the label.
    None where the gradient has another form.
    """
    gradient, logits = reference.get(key), reference.get(in_phase(key, "forward"))
    if gradient is None or logits is None or logits.dim() < 2 or logits.shape[-1] < 4:
        return None
    wide, softmax = gradient.double(), logits.double().softmax(-1)
    is_other = torch.ones_like(wide, dtype=torch.bool).scatter(-1, wide.argmin(-1, keepdim=True), value=False)
    number = logits.shape[-1] - 1
    centred, centred_gradient = (
        (tensor - (tensor * is_other).sum(-1, keepdim=True) / number) * is_other for tensor in (softmax, wide)
    )
    weight = (centred * centred_gradient).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True)
    remaining = frobenius_distance(weight * centred, centred_gradient)
    limit = max(FITTED_RELATIVE_ERROR, RECOMPUTED_FACTOR * torch.finfo(gradient.dtype).eps)
    return weight * softmax if remaining <= limit * frobenius(wide) else None


def gradients_of_uses(
    evidence: Evidence, step: int, parameter: ComparedParameter
) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Return each rank's part of what each call of a parameter's module adds to its gradient, where there are several.

    Known for linear modules, and for weights and biases of norms and the like, in steps of one micro-batch. Over DP no
    rank has the inputs of all.
    """
    reference = evidence.reference[step].activations
    output = TensorKey("backward", parameter.module, 0, "output", "0")
    calls = sorted(
        key.call for key in reference if (key.phase, key.module, key.role) == ("backward", output.module, "output")
    )
    layout = evidence.layouts.get(parameter.name)
    if len(evidence.reference[step].micro_gradients) > 1:
        return ()
    if not 1 < len(calls) <= MOST_USES or evidence.topology.dp > 1 or layout is None:
        return ()
    uses = [_gradient_of_use(evidence, step, parameter, call) for call in calls]
    known = [use for use in uses if use is not None and use.shape == parameter.expected.shape]
    if len(known) < len(uses):
        return ()
    error = frobenius_distance(torch.stack(known).sum(dim=0), parameter.expected.double())
    is_sum = error <= RECOMPUTED_FACTOR * parameter.difference.allowed
    return tuple(layout.parts(use) for use in known) if is_sum else ()


def _gradient_of_use(evidence: Evidence, step: int, parameter: ComparedParameter, call: int) -> torch.Tensor | None:
    reference, module = evidence.reference[step].activations, parameter.module
    inputs, outputs = (
        TensorKey("forward", module, call, "input", "0"),
        TensorKey("forward", module, call, "output", "0"),
    )
    if parameter.expected.dim() == 2:
        return gradient_product(reference, inputs, in_phase(outputs, "backward"))
    output, gradient = reference.get(outputs), reference.get(in_phase(outputs, "backward"))
    if parameter.expected.dim() != 1 or output is None or gradient is None or output.shape != gradient.shape:
        return None
    weights = evidence.weights_before(step)
    weight, bias = (weights.get(f"{module}.{name}") for name in ("weight", "bias"))
    rows: torch.Tensor = gradient.double().flatten(0, -2)
    if parameter.name.endswith(".bias"):
        return rows.sum(dim=0)
    if weight is None or output.shape[-1:] != weight.shape or not bool(weight.all()):
        return None
    normed: torch.Tensor = (output.double() - (0 if bias is None else bias.double())) / weight.double()
    return (rows * normed.flatten(0, -2)).sum(dim=0)
