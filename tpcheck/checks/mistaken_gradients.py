"""What each rank's gradient of a parameter would be under mistakes that need more than that gradient to tell."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tpcheck.checks.parameters import ComparedParameter
from tpcheck.records import Evidence
from tpcheck.records.suspect import Mistaken


def mistaken_gradients(evidence: Evidence, step: int, one: ComparedParameter) -> tuple[Mistaken, ...]:
    """Return the mistakes of a parameter whose gradient is wrong."""
    if not one.expected_parts:
        return ()
    return (*_averaged_wrongly(evidence, step, one.name), *_of_other_layers(evidence, step, one))


def _averaged_wrongly(evidence: Evidence, step: int, name: str) -> Iterator[Mistaken]:
    """Yield what a gradient is without the mean over DP, and with one over the TP group in its place."""
    own = evidence.reference[step].own_gradients.get(name)
    if own is None:
        return
    layout = evidence.layouts[name]
    alone = tuple(layout.local(own, tp_rank) for tp_rank in range(len(evidence.candidate[step])))
    if _averages_over_tp(evidence, step) and len({part.shape for part in alone}) == 1:
        mean = torch.stack([part.double() for part in alone]).mean(dim=0)
        yield Mistaken("wrong_group", (mean,) * len(alone), {"note": "it is averaged over the TP group"})
    yield Mistaken("missing_reduce", alone, {"note": "it is that of its own replica's batch, not the mean over DP"})


def _averages_over_tp(evidence: Evidence, step: int) -> bool:
    """Return whether the ranks hold one gradient for different shards of some parameter."""
    steps = evidence.candidate[step]
    if len(steps) < 2:
        return False
    for name, layout in evidence.layouts.items():
        parts = [one.gradients.get(name) for one in steps]
        first = parts[0]
        if layout.is_replicated or first is None or not first.any():
            continue
        if all(part is not None and torch.equal(part, first) for part in parts):
            return True
    return False


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
