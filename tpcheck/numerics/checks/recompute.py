"""Recomputes linear modules from each rank's inputs and weights: an earlier fault does not hide one of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tpcheck.core.placement import Shard
from tpcheck.numerics.activation_placement import infer_placement
from tpcheck.numerics.checks.suspects import ComparedParameter, tensor_suspect
from tpcheck.numerics.differences import Difference, frobenius, frobenius_distance, subtract, summarize
from tpcheck.numerics.evidence import Evidence, Kind, LinearTerms, Suspect, TensorKey
from tpcheck.numerics.tolerance import RECOMPUTED_FACTOR


def recompute_linear(evidence: Evidence, step: int, key: TensorKey, allowed: float) -> LinearTerms | None:
    """Return the terms of the module whose output `key` is, or None where it is no linear module.

    It is one if the reference's output is the product of the reference's input and weight, plus its bias.

    Args:
        allowed: Largest Frobenius error of that output.
    """
    name = f"{key.module}.weight"
    layout = evidence.layouts.get(name)
    input_key = replace(key, role="input", path="0")
    reference = evidence.reference[step].activations
    full_input, expected = reference.get(input_key), reference.get(key)
    if layout is None or full_input is None or key.role != "output" or key.phase != "forward":
        return None
    weight, bias = (evidence.weights_before(step).get(each) for each in (name, f"{key.module}.bias"))
    if expected is None or weight is None or weight.dim() != 2 or full_input.shape[-1:] != weight.shape[1:]:
        return None
    wide_bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    product = full_input.double() @ weight.double().t() + wide_bias
    if frobenius_distance(product, expected.double()) > RECOMPUTED_FACTOR * allowed:
        return None
    placement = layout.placement()
    cut_dim = placement.dim if isinstance(placement, Shard) else None
    by_rank = _products(evidence, step, input_key, name, placement if cut_dim == 1 else None)
    if by_rank is None:
        return None
    bias_parts = weight_parts(evidence, step, f"{key.module}.bias") or (wide_bias[:0],) * len(by_rank)
    return LinearTerms(by_rank, wide_bias, tuple(part.double() for part in bias_parts), are_summed=cut_dim == 1)


def recompute_input_gradient(evidence: Evidence, step: int, key: TensorKey, allowed: float) -> LinearTerms | None:
    """Return what each rank's output gradient and weight give for the input gradient `key`, to be summed.

    None where the module is no linear one that is cut along its output features (column-parallel).

    Args:
        allowed: Largest Frobenius error of that input gradient.
    """
    name = f"{key.module}.weight"
    layout = evidence.layouts.get(name)
    placement = layout.placement() if layout is not None else None
    output_key = replace(key, role="output", path="0")
    full_gradient, expected = (evidence.reference[step].activations.get(each) for each in (output_key, key))
    weight, parts = evidence.weights_before(step).get(name), weight_parts(evidence, step, name)
    gradients = [given.get(output_key) for given in _given(evidence, step, output_key)]
    if not isinstance(placement, Shard) or placement.dim != 0 or (key.phase, key.role) != ("backward", "input"):
        return None
    if full_gradient is None or expected is None or weight is None or weight.dim() != 2 or parts is None:
        return None
    pairs = [(gradient, part) for gradient, part in zip(gradients, parts, strict=True) if gradient is not None]
    products = (*pairs, (full_gradient, weight))
    if len(pairs) < len(parts) or any(gradient.shape[-1] != len(part) for gradient, part in products):
        return None
    if frobenius_distance(full_gradient.double() @ weight.double(), expected.double()) > RECOMPUTED_FACTOR * allowed:
        return None
    terms = tuple(gradient.double() @ part.double() for gradient, part in pairs)
    no_bias = torch.zeros((), dtype=torch.float64)
    return LinearTerms(terms, no_bias, (no_bias[None][:0],) * len(terms), are_summed=True)


def recompute_weight_gradient(
    evidence: Evidence, step: int, parameter: ComparedParameter, allowed: float | None = None
) -> tuple[torch.Tensor, ...] | None:
    """Return what each rank's input and output gradient give for its shard of a weight.

    None where the reference's do not give its gradient (the module is no linear one, or the weight is used elsewhere,
    too), and over DP, where no rank has the inputs of all.

    Args:
        allowed: How far the reference's may be from giving its gradient; by default what was compared is allowed.
    """
    if allowed is None:
        allowed = RECOMPUTED_FACTOR * parameter.difference.allowed
    reference = evidence.reference[step]
    num_micro_batches = max(1, len(reference.micro_gradients))
    expected_product = _gradient_product(reference.activations, parameter.module, num_micro_batches)
    if evidence.topology.dp > 1 or expected_product is None or expected_product.shape != parameter.expected.shape:
        return None
    if frobenius_distance(expected_product, parameter.expected.double()) > allowed:
        return None
    weights = weight_parts(evidence, step, parameter.name)
    keys = [key for number in range(num_micro_batches) for key in _keys_of_product(parameter.module, number)]
    products = [
        _gradient_product(given, parameter.module, num_micro_batches) for given in _given(evidence, step, *keys)
    ]
    recomputed = tuple(product for product in products if product is not None)
    shapes = [] if weights is None else [part.shape for part in weights]
    return recomputed if [part.shape for part in recomputed] == shapes else None


def _gradient_product(activations: Mapping[TensorKey, Any], module: str, num_micro_batches: int) -> torch.Tensor | None:
    """Return the sum over the micro-batches of what inputs and output gradients of a linear module give."""
    products = [gradient_product(activations, *_keys_of_product(module, number)) for number in range(num_micro_batches)]
    known = [product for product in products if product is not None]
    if len(known) < len(products) or len({product.shape for product in known}) > 1:
        return None
    return torch.stack(known).sum(dim=0)


def _keys_of_product(module: str, micro_batch: int) -> tuple[TensorKey, TensorKey]:
    """Return the keys of the input and of the gradient of the output."""
    input_key = TensorKey("forward", module, 0, "input", "0", micro_batch)
    return input_key, replace(input_key, phase="backward", role="output")


def _given(evidence: Evidence, step: int, *keys: TensorKey) -> list[dict[TensorKey, torch.Tensor]]:
    """Return what modules were given on each rank: what was recorded, or the reference's part where it was forced."""
    given: list[dict[TensorKey, torch.Tensor]] = [{} for _ in evidence.candidate[step]]
    for key in keys:
        if key in evidence.forced_on_some:
            continue
        recorded = [rank.activations.get(key) for rank in evidence.candidate[step]]
        parts, expected = [part for part in recorded if part is not None], evidence.reference[step].activations.get(key)
        if key in evidence.forced_inputs and expected is not None and len(parts) == len(recorded):
            placed = infer_placement(expected.shape, parts)
            if placed is not None:
                recorded = [placed.expected_part(expected, tp_rank) for tp_rank in range(len(parts))]
        for of_rank, part in zip(given, recorded, strict=True):
            if part is not None:
                of_rank[key] = part
    return given


def gradient_product(
    activations: Mapping[TensorKey, Any], input_key: TensorKey, output_key: TensorKey
) -> torch.Tensor | None:
    """Return the gradient of a linear module's weight that its input and the gradient of its output give."""
    inputs, gradients = activations.get(input_key), activations.get(output_key)
    if inputs is None or gradients is None or inputs.shape[:-1] != gradients.shape[:-1] or inputs.dim() < 2:
        return None
    product: torch.Tensor = gradients.double().flatten(0, -2).t() @ inputs.double().flatten(0, -2)
    return product


def weight_parts(evidence: Evidence, step: int, name: str) -> tuple[Any, ...] | None:
    """Return each rank's shard of a parameter during `step`, by tp_rank, or None where a rank has none."""
    weights = evidence.parts_before(step)
    return tuple(tensors[name] for tensors in weights) if all(name in tensors for tensors in weights) else None


def _products(
    evidence: Evidence, step: int, input_key: TensorKey, name: str, cut_features: Shard | None
) -> tuple[torch.Tensor, ...] | None:
    """Return each rank's input times its weight; a full input is cut where the weight's input features are."""
    weights = weight_parts(evidence, step, name)
    recorded = [given.get(input_key) for given in _given(evidence, step, input_key)]
    inputs = [tensor for tensor in recorded if tensor is not None]
    if weights is None or len(inputs) < len(recorded):
        return None
    products = []
    for tp_rank, (tensor, weight) in enumerate(zip(inputs, weights, strict=True)):
        if cut_features is not None and tensor.shape[-1] != weight.shape[1]:
            ranges = cut_features.ranges(tensor.shape[-1], len(weights), tp_rank)
            tensor = torch.cat([tensor[..., indices.start : indices.stop] for indices in ranges], dim=-1)
        if tensor.shape[-1:] != weight.shape[1:]:
            return None
        products.append(tensor.double() @ weight.double().t())
    return tuple(products)


def parts_of(terms: LinearTerms, shapes: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...] | None:
    """Return the outputs that the terms give on the ranks; None where none of these has the shapes."""
    if terms.are_summed:
        bias = terms.bias_parts[0]
        parts = (terms.total + bias if bias.numel() else terms.total,) * len(shapes)
    else:
        pairs = zip(terms.by_rank, terms.bias_parts, strict=True)
        parts = tuple(product + bias if bias.numel() else product for product, bias in pairs)
        if any(part.shape[-1] < shape[-1] for part, shape in zip(parts, shapes, strict=True)):
            parts = (torch.cat(parts, dim=-1),) * len(shapes)  # gathered
    return parts if all(part.shape == tuple(shape) for part, shape in zip(parts, shapes, strict=True)) else None


NOTES: Mapping[Kind, str] = {
    "activation": "compared with the output recomputed from its inputs and weights",
    "input_gradient": "compared with the gradient recomputed from its output gradient and weight",
    "gradient": "compared with the gradient recomputed from its input and output gradient",
}


def compare_with_recomputed(
    evidence: Evidence,
    actual_parts: Sequence[torch.Tensor],
    recomputed: Sequence[torch.Tensor],
    from_reference: Difference,
    *,
    check: str,
    kind: Kind,
    where: Mapping[str, Any],
    is_replicated: bool,
    terms: Sequence[torch.Tensor] = (),
    are_summed_later: Callable[[], bool] = lambda: False,
) -> Suspect | None:
    """Return the suspect for parts that the ranks' inputs and weights do not give; None where they do.

    Args:
        recomputed: What those give, one tensor for each part.
        from_reference: How far the parts are from the reference's.
        terms: What the ranks may have in place of that, if `are_summed_later()`.
    """
    size = frobenius(torch.cat([part.reshape(-1) for part in recomputed]))
    growth = max(1.0, size / from_reference.expected_norm if from_reference.expected_norm else 1.0)
    gaps = [subtract(part, right) for part, right in zip(actual_parts, recomputed, strict=True)]
    difference = summarize(gaps, size, RECOMPUTED_FACTOR * growth * from_reference.allowed, is_replicated=is_replicated)
    if difference.agrees or (_equal(actual_parts, terms, difference.allowed) and are_summed_later()):
        return None
    return tensor_suspect(
        evidence,
        difference,
        check=check,
        kind=kind,
        where=where,
        expected=recomputed[0] if is_replicated else None,
        actual_parts=actual_parts,
        expected_parts=recomputed,
        is_replicated=is_replicated,
        details={"inputs_agree": False, "note": NOTES[kind]},
    )


def _equal(parts: Sequence[torch.Tensor], others: Sequence[torch.Tensor], allowed: float) -> bool:
    return len(parts) == len(others) and all(
        frobenius_distance(part, other) <= allowed for part, other in zip(parts, others, strict=True)
    )
