"""Causes that only whole tensors of two runs show, beside those of `tpcheck.numerics.hypotheses`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.differences import frobenius, frobenius_distance, rounding_error
from tpcheck.numerics.evidence import Evidence, TensorKey
from tpcheck.numerics.tolerance import LEAST_MULTIPLES, RESIDUAL_EXACT, RESIDUAL_NOISY, SAFETY_FACTOR

CAUSES_OF_ORDER = (Cause.FUSED_BLOCKS_INTERLEAVED, Cause.SHARD_ORDER_SWAPPED, Cause.HEAD_MAPPING_WRONG)
"""Those by which a weight has the right elements in another order over the ranks."""


def _largest_residual(observed: float, allowed: float) -> float:
    return max(RESIDUAL_EXACT * observed, min(allowed, RESIDUAL_NOISY * observed))


# ---- statistics over cut features


def statistic_without_backward(evidence: Evidence, wrong: TensorKey, allowed: float) -> Explanation | None:
    """A gradient of cut features lacks, in each row, a multiple of the module's input, its output, or a constant.

    A norm divides by a statistic of all features of a row, a softmax by their sum. Where the ranks' parts of it are
    added up without a backward pass, what should come back through it is missing: one number for each row and rank,
    times the input of a norm (and a constant, of its mean), or the output of a softmax.

    Args:
        wrong: The gradient of the output that goes into that module.
    """
    reference, ranks = evidence.reference[0].activations, evidence.candidate[0]
    source = TensorKey("forward", wrong.module, wrong.call, "output", wrong.path)
    actual = [rank.activations[wrong] for rank in ranks if wrong in rank.activations]
    if wrong not in reference or source not in reference or len(actual) < max(2, len(ranks)):
        return None
    expected: torch.Tensor = reference[wrong]
    width = [part.shape[-1] if part.dim() else 0 for part in actual]
    if sum(width) != expected.shape[-1] or min(width) < 2 * LEAST_MULTIPLES:
        return None
    missing = expected.double() - torch.cat(actual, -1).double()
    limit = _largest_residual(frobenius(missing), allowed)
    for module, rows in _rows_around(evidence, source):
        pairs = zip(torch.split(missing, width, -1), torch.split(rows, width, -1), strict=True)
        error = frobenius(torch.cat([_without_multiples(part, of) for part, of in pairs], -1))
        if error <= limit:
            note = f"what is missing is, in each row, a multiple of what {module} is given or returns"
            evidence_of_sum = {"sum_in": [module], "note": note}
            return Explanation(Cause.COLLECTIVE_WITHOUT_BACKWARD, error / frobenius(expected), evidence_of_sum)
    return None


def _rows_around(evidence: Evidence, source: TensorKey) -> list[tuple[str, torch.Tensor]]:
    """Return the input and the output of each module that is given the tensor, where both have its shape."""
    reference, found = evidence.reference[0].activations, []
    given = reference[source]
    for key, tensor in reference.items():
        if (key.phase, key.role) == ("forward", "input") and tensor.shape == given.shape and torch.equal(tensor, given):
            output = reference.get(TensorKey("forward", key.module, key.call, "output", "0"))
            found += [(key.module, given.double())]
            if output is not None and output.shape == given.shape:
                found += [(key.module, output.double())]
    return found


def _without_multiples(missing: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return what is left of each row without its best multiple of the other row, and a constant."""
    basis = torch.stack([rows, torch.ones_like(rows)], -1)  # (..., features, 2)
    shares = torch.linalg.lstsq(basis, missing.unsqueeze(-1)).solution
    left: torch.Tensor = missing - (basis @ shares).squeeze(-1)
    return left


# ---- fused halves

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu (tanh)": lambda gate: functional.gelu(gate, approximate="tanh"),
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
}


def halves_read_in_another_order(evidence: Evidence, allowed: float) -> Explanation | None:
    """Gate and up were cut as one block, and each rank takes the halves of its own part for gate and up.

    The expected run multiplies an activation of one half by the other: that is looked for, and then made of the halves
    that the ranks have.
    """
    reference, ranks = evidence.reference[0].activations, evidence.candidate[0]
    for source, fused in reference.items():
        if (source.phase, source.role) != ("forward", "output") or not fused.dim() or fused.shape[-1] % 2:
            continue
        local = [rank.activations[source] for rank in ranks if source in rank.activations]
        sizes = {part.shape[-1] for part in local}
        if len(local) < len(ranks) or sizes != {fused.shape[-1] // len(ranks)} or min(sizes) % 2:
            continue
        if frobenius_distance(torch.cat(local, -1), fused) > max(allowed, _rounding(fused)):
            continue  # cut half by half, or wrong already
        for key, product in reference.items():
            if key.role != "input" or key.phase != "forward" or product.shape[-1] * 2 != fused.shape[-1]:
                continue
            actual = [rank.activations[key] for rank in ranks if key in rank.activations]
            if len(actual) < len(ranks) or product.shape[:-1] != fused.shape[:-1]:
                continue
            found = _of_halves(fused, product, local, actual, allowed)
            if found is not None:
                return Explanation(
                    Cause.FUSED_BLOCKS_INTERLEAVED, found[1], {"activation": found[0], "fused_in": source.module}
                )
    return None


def _of_halves(
    fused: torch.Tensor,
    product: torch.Tensor,
    local: Sequence[torch.Tensor],
    actual: Sequence[torch.Tensor],
    allowed: float,
) -> tuple[str, float] | None:
    """Return the activation that makes the product of the halves, and the error of the ranks' products made so."""
    observed = frobenius_distance(torch.cat(list(actual), -1), product)
    if observed <= max(allowed, _rounding(product)):
        return None
    limit = max(RESIDUAL_EXACT * observed, _rounding(product))
    for name, activation in ACTIVATIONS.items():
        if frobenius_distance(_gated(fused, activation), product) > _rounding(product):
            continue
        error = max(
            frobenius_distance(_gated(part, activation), made) for part, made in zip(local, actual, strict=True)
        )
        if error <= limit:
            return name, error / frobenius(product)
    return None


def _rounding(tensor: torch.Tensor) -> float:
    return SAFETY_FACTOR * rounding_error(tensor)


def _gated(fused: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    gate, up = fused.chunk(2, -1)
    return activation(gate) * up
