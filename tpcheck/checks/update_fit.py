"""Reads off a step which gradient scale, weight decay and momentum each rank's weights have really moved by.

A step of SGD moves a weight by a sum: some of the gradient, some of the weight, some of the step before. Least squares
gives the three shares on both sides; their ratios say what kind of setting differs, and the share of the gradient by
which norm it was clipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tpcheck.checks.norms import norms_of_usual_mistakes
from tpcheck.records import Evidence
from tpcheck.records.suspect import Mistaken

_OF_ANOTHER_RANK = "the momentum of another rank's shard gives these weights"
_TERMS = ("gradient", "weight", "momentum")
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_FITS = 1e-6  # of the step; what no sum of the three explains stays above


def fitted_step(evidence: Evidence, step: int, name: str) -> dict[str, Any]:
    """Return what the weights of a parameter say of the step; nothing where they are no such sum."""
    layout = evidence.layouts[name]
    before, terms = _terms(evidence, step, name)
    if terms is None or evidence.reference[step].gradient_norm is None:
        return {}
    tp = len(evidence.candidate[step])
    ratios: list[dict[str, float]] = []
    for tp_rank in range(tp):
        local = [layout.local(term, tp_rank).double().reshape(-1) for term in terms]
        start = layout.local(before, tp_rank).double().reshape(-1)
        after = layout.local(evidence.reference[step].weights[name], tp_rank).double().reshape(-1)
        actual = evidence.candidate[step][tp_rank].weights[name].double().reshape(-1)
        shares = [_shares(local, end - start) if end.shape == start.shape else None for end in (after, actual)]
        if shares[0] is None or shares[1] is None:
            return {}
        pairs = zip(_TERMS, shares[0], shares[1], strict=False)
        ratios.append({term: own / expected for term, expected, own in pairs if expected})
    found = {f"{term}_ratio": [float(f"{ratio[term]:.6g}") for ratio in ratios] for term in ratios[0]}
    return found | _norms(evidence, step, [ratio.get("gradient", 0.0) for ratio in ratios])


def momentum_mistakes(evidence: Evidence, step: int, name: str) -> Iterator[Mistaken]:
    """Yield what each rank's weights would be with the momentum of another rank's shard: of one, or of a neighbour."""
    layout, tp = evidence.layouts[name], len(evidence.candidate[step])
    before, terms = _terms(evidence, step, name)
    after = evidence.reference[step].weights[name]
    if terms is None or len(terms) < len(_TERMS) or layout.is_replicated or len(set(layout.local_shapes)) > 1:
        return
    shares = _shares([term.double().reshape(-1) for term in terms], (after - before).double().reshape(-1))
    if shares is None:
        return
    right = [layout.local(after, tp_rank).double() for tp_rank in range(tp)]
    moves = [layout.local(terms[-1], tp_rank).double() for tp_rank in range(tp)]
    one_everywhere = [("shard_repeated", [source] * tp) for source in range(tp)]
    shifted = [("shard_order_swapped", [(rank + by) % tp for rank in range(tp)]) for by in range(1, tp)]
    for cause, sources in (*one_everywhere, *shifted):
        parts = (
            own + shares[-1] * (moves[source] - move) for own, move, source in zip(right, moves, sources, strict=True)
        )
        yield Mistaken(cause, tuple(parts), {"momentum_of_tp_rank": sources, "note": _OF_ANOTHER_RANK})


def _terms(evidence: Evidence, step: int, name: str) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    updated = [number for number in range(step) if evidence.reference[number].weights]
    before: torch.Tensor = evidence.weights_before(step)[name]
    accumulated = evidence.reference[updated[-1] + 1 if updated else 0 : step + 1]
    gradients = [gradient for one in accumulated if (gradient := one.gradients[name]) is not None]
    if not gradients:
        return before, None
    earlier = [before - evidence.weights_before(updated[-1])[name]] if updated else []
    return before, [torch.stack(gradients).sum(dim=0), before, *earlier]


def _shares(terms: Sequence[torch.Tensor], moved: torch.Tensor) -> list[float] | None:
    """Return the share of each term in the move, or None where the move is no such sum."""
    if moved.numel() <= 2 * len(terms) or not bool(moved.isfinite().all()):
        return None
    columns = torch.stack(list(terms), dim=1)
    sizes = torch.linalg.vector_norm(columns, dim=0)
    if not bool(torch.all(sizes > 0)):
        return None
    solution = torch.linalg.lstsq(columns / sizes, moved[:, None]).solution[:, 0]
    left = torch.linalg.vector_norm(columns / sizes @ solution - moved)
    if float(left) > _FITS * float(torch.linalg.vector_norm(moved)):
        return None
    return [float(share) for share in solution / sizes]


def _norms(evidence: Evidence, step: int, ratios: Sequence[float]) -> dict[str, Any]:
    expected = evidence.reference[step].gradient_norm
    if expected is None or not all(ratios):
        return {}
    implied = [(expected + _CLIP_EPSILON) / ratio - _CLIP_EPSILON for ratio in ratios]
    return {"norm_implied": implied, **norms_of_usual_mistakes(evidence, step)}
