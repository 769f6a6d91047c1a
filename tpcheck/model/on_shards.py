"""What an optimizer computes where it is given each rank's shards alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch.nn.utils import clip_grads_with_norm_

from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.sgd import Sgd
from tpcheck.numerics.evidence import Evidence
from tpcheck.numerics.precision import reduced_precision_raised

Weights = Mapping[str, torch.Tensor]


def steps_on_shards(
    options: TrainingOptions, evidence: Evidence, decayed: Collection[str] | None = None
) -> tuple[tuple[Weights, ...], ...]:
    """Return each rank's parameters after each step, by step, then by tp_rank, from the expected gradients' shards.

    Clipping is right: it uses the expected norm. Nothing for SGD, which steps each element by itself.

    Args:
        decayed: Names of the parameters whose weights decay; None for all.
    """
    if options.optimizer == "sgd" or evidence.topology.tp == 1:
        return ()
    by_rank = [_train(options, evidence, tp_rank, decayed) for tp_rank in range(evidence.topology.tp)]
    return tuple(zip(*by_rank, strict=True))


def _train(
    options: TrainingOptions, evidence: Evidence, tp_rank: int, decayed: Collection[str] | None
) -> Sequence[Weights]:
    initial = evidence.initial_parts[tp_rank]
    names = [name for name in evidence.initial if name in evidence.layouts and name in initial]
    parameters = {name: torch.nn.Parameter(initial[name].detach().clone()) for name in names}
    norms = iter([step.gradient_norm for step in evidence.reference if not step.is_skipped])

    def clip(masters: Sequence[torch.Tensor], max_norm: float) -> float:
        norm = next(norms)
        if max_norm > 0 and norm is not None:
            clip_grads_with_norm_(masters, max_norm, torch.tensor(norm, dtype=torch.float64))
        return norm or 0.0

    decays = None if decayed is None else [name in decayed for name in names]
    optimizer = Sgd(list(parameters.values()), options, clip, decays, names)
    steps = []
    for step in evidence.reference:
        if step.is_skipped:
            steps.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
            continue
        for name, parameter in parameters.items():
            gradient = step.gradients[name]
            is_whole = gradient is not None and tuple(gradient.shape) == tuple(evidence.layouts[name].shape)
            parameter.grad = (
                evidence.layouts[name].local(gradient, tp_rank).to(parameter.dtype, copy=True) if is_whole else None
            )
        with reduced_precision_raised(options.dtype is torch.float64):
            optimizer.step()
        steps.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    return steps
