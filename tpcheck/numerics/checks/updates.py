"""Are the weights and buffers after an optimizer step the reference's?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tpcheck.core.causes import Cause
from tpcheck.numerics.checks.norms import norm_hypotheses
from tpcheck.numerics.checks.parameters import ComparedParameter, compare_parameters, parameter_suspect
from tpcheck.numerics.checks.replicas import replicas_differ
from tpcheck.numerics.checks.suspects import tensor_suspect
from tpcheck.numerics.differences import Difference, Placed, compare_placed, own_rounding, place, spacing
from tpcheck.numerics.evidence import CheckOutcome, Evidence, Hypothesis, Suspect


@dataclass(frozen=True, slots=True)
class ComparedBuffer:
    """One buffer on both sides, and how far they are apart."""

    name: str
    expected: Any
    placed: Placed
    found: Difference

    @property
    def label(self) -> str:
        return f"buffer {self.name}"


def compare_buffers(evidence: Evidence, step: int) -> tuple[list[ComparedBuffer], dict[str, str]]:
    """Return what could be compared, and why the rest could not, by label. Calibrated."""
    compared = []
    missed = {}
    for name, expected in evidence.reference[step].buffers.items():
        parts = [part.buffers[name] for part in evidence.candidate[step] if name in part.buffers]
        if len(parts) < len(evidence.candidate[step]):
            missed[f"buffer {name}"] = "the sharded model has no buffer of this name"
        elif any(part.shape != expected.shape for part in parts):
            missed[f"buffer {name}"] = "the sharded model's buffer has another shape"
        else:
            key = (step, evidence.dp_rank, "buffer", name)
            placed = place(expected.shape, parts)
            assert placed is not None  # equal shapes are replicas
            allowed = evidence.tolerance.allowed(key, own_rounding(expected))
            compared.append(ComparedBuffer(name, expected, placed, compare_placed(placed, expected, allowed)))
    return compared, missed


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


def momentum_hypotheses(evidence: Evidence, step: int, name: str) -> Iterator[Hypothesis]:
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
    one_everywhere = [(Cause.SHARD_REPEATED, [source] * tp) for source in range(tp)]
    shifted = [(Cause.SHARD_ORDER_SWAPPED, [(rank + by) % tp for rank in range(tp)]) for by in range(1, tp)]
    for cause, sources in (*one_everywhere, *shifted):
        parts = (
            own + shares[-1] * (moves[source] - move) for own, move, source in zip(right, moves, sources, strict=True)
        )
        yield Hypothesis(cause, tuple(parts), {"momentum_of_tp_rank": sources, "note": _OF_ANOTHER_RANK})


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
    return {"norm_implied": implied, **norm_hypotheses(evidence, step)}


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
    return replace(
        suspect, hypotheses=(Hypothesis(Cause.STALE_WEIGHT, stale), *momentum_hypotheses(evidence, step, one.name))
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
