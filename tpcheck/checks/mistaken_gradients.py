"""What each rank's gradient of a parameter would be under mistakes that need more than that gradient to tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tpcheck.checks.parameters import ComparedParameter
from tpcheck.records import Evidence
from tpcheck.records.suspect import Mistaken


def mistaken_gradients(evidence: Evidence, step: int, one: ComparedParameter) -> tuple[Mistaken, ...]:
    """Return the mistakes of a parameter whose gradient is wrong."""
    if not one.expected_parts:
        return ()
    return (
        *_untied(evidence, step, one),
        *_averaged_wrongly(evidence, step, one),
        *_of_other_layers(evidence, step, one),
    )


def _untied(evidence: Evidence, step: int, one: ComparedParameter) -> Iterator[Mistaken]:
    """Yield what a gradient is without that of a weight which is tied with it in the reference alone."""
    steps = evidence.candidate[step]
    for name in sorted(steps[0].gradients.keys() - evidence.reference[step].gradients.keys()):
        others = [part.gradients.get(name) for part in steps]
        pairs = list(zip(one.expected_parts, others, strict=True))
        if all(other is not None and other.shape == whole.shape for whole, other in pairs):
            yield Mistaken("tied_weight_untied", tuple(whole - other for whole, other in pairs), {"tied_with": name})


def _averaged_wrongly(evidence: Evidence, step: int, one: ComparedParameter) -> Iterator[Mistaken]:
    """Yield what a gradient is without the mean over DP, and with another group in its place: TP, or all ranks."""
    own = evidence.reference[step].own_gradients.get(one.name)
    layout = evidence.layouts[one.name]
    alone = () if own is None else tuple(layout.local(own, tp_rank) for tp_rank in range(len(one.parts)))
    if _reduces_over_tp(evidence, step):
        yield from _over_tp(alone, "it is averaged over the TP group", mean=True)
        yield from _over_tp(one.expected_parts, "it is averaged over the TP group, too", mean=True)
        yield from _over_tp(one.expected_parts, "it is summed over the TP group", mean=False)
    if alone:
        yield Mistaken("missing_reduce", alone, {"note": "it is that of its own replica's batch, not the mean over DP"})


def _over_tp(parts: Sequence[torch.Tensor], note: str, *, mean: bool) -> Iterator[Mistaken]:
    """Yield what all ranks hold once their parts, of one shape, are added up."""
    if len({part.shape for part in parts}) == 1:
        total = torch.stack([part.double() for part in parts]).sum(dim=0)
        yield Mistaken("wrong_group", (total / len(parts) if mean else total,) * len(parts), {"note": note})


def _reduces_over_tp(evidence: Evidence, step: int) -> bool:
    """Return whether the ranks hold one gradient for different shards, of most parameters: one alone is no group's."""
    steps = evidence.candidate[step]
    equal = []
    for name, layout in evidence.layouts.items():
        first, *others = (one.gradients.get(name) for one in steps)
        if not layout.is_replicated and first is not None and bool(first.any()):
            equal.append(all(other is not None and torch.equal(other, first) for other in others))
    return len(steps) > 1 and sum(equal) > len(equal) / 2


def _of_other_layers(evidence: Evidence, step: int, one: ComparedParameter) -> Iterator[Mistaken]:
    """Yield the gradients of all other parameters that lie over the ranks as this one does."""
    shapes = [part.shape for part in one.expected_parts]
    for name, gradient in evidence.reference[step].gradients.items():
        layout = evidence.layouts.get(name)
        if name == one.name or gradient is None or layout is None or tuple(gradient.shape) != tuple(layout.shape):
            continue
        parts = tuple(layout.local(gradient, tp_rank) for tp_rank in range(len(shapes)))
        if [part.shape for part in parts] == shapes:
            yield Mistaken("tensor_of_another_layer", parts, {"it_is_of": name})
