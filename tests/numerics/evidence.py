"""Builds evidence and suspects by hand: two ranks of a block with a norm, a column- and a row-parallel layer.

Shape suffixes: B samples, L tokens, D features, F inner features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import hypot
from typing import Any

import torch

from tpcheck.backends.layout import Layout
from tpcheck.core.causes import Cause
from tpcheck.core.clipping import Clipping
from tpcheck.core.digests import digest
from tpcheck.core.placement import Replicate, Shard
from tpcheck.core.topology import Topology
from tpcheck.numerics.evidence import Evidence, Kind, RankFacts, Step, Suspect, TensorKey
from tpcheck.numerics.hypotheses import explain
from tpcheck.numerics.tolerance import Tolerance

Tensor = torch.Tensor

B, L, D, F = 2, 3, 4, 8
NORM, UP, DOWN, BIAS = "block.norm.weight", "block.up.weight", "block.down.weight", "block.down.bias"
BUFFER = "block.scale"
_PLACEMENTS = {NORM: Replicate(), UP: Shard(0), DOWN: Shard(1), BIAS: Replicate()}
_CUT_FEATURES = ("block.up output", "block.down input")
CLIPPING = Clipping(0.01)  # of which the learning rate is a multiple: every gradient is larger
_MOMENTUM, _LEARNING_RATE = 0.5, 0.125


def key(name: str, phase: str = "forward") -> TensorKey:
    """Return the key of `block.up output`."""
    module, _, role = name.rpartition(" ")
    return TensorKey(phase, module, 0, role, "0")  # type: ignore[arg-type]


def right_evidence(*, tp: int = 2, dp: int = 1, steps: int = 1) -> Evidence:
    """Return the evidence of a run in which every tensor of every rank is right."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    initial = {NORM: drawn(D), UP: drawn(F, D), DOWN: drawn(D, F), BIAS: drawn(D)}
    layouts = {
        name: Layout.from_placement(initial[name].shape, placement, tp) for name, placement in _PLACEMENTS.items()
    }
    reference, weights, momentum = [], initial, dict.fromkeys(initial, torch.zeros((), dtype=torch.float64))
    for _ in range(steps):
        step = _reference_step(weights, drawn(B, L, D), drawn(1))
        momentum = {name: _MOMENTUM * momentum[name] + step.gradients[name] for name in weights}
        weights = {name: weights[name] - _LEARNING_RATE * momentum[name] for name in weights}
        local = {name: step.gradients[name] + drawn(*weights[name].shape) for name in weights} if dp > 1 else {}
        reference.append(replace(step, weights=weights, local_gradients=local))
    candidate = tuple(tuple(_part_of(step, layouts, tp, rank) for rank in range(tp)) for step in reference)
    initial_parts = tuple(_parameter_parts(initial, layouts, rank) for rank in range(tp))
    topology = Topology(tp=tp, dp=dp)
    start = [_digests("parameter", parts) | {("buffer", BUFFER): "the same"} for parts in initial_parts]
    return Evidence(
        topology=topology,
        dp_rank=0,
        dtype="float64",
        initial=initial,
        initial_parts=initial_parts,
        layouts=layouts,
        reference=tuple(reference),
        candidate=candidate,
        buffers=(BUFFER,),
        facts=tuple(
            RankFacts(
                {axis: (topology.peers(rank, axis),) for axis in ("tp", "dp")},
                (start[rank % tp], *(step[rank % tp].digests for step in candidate)),
            )
            for rank in range(topology.world_size)
        ),
        tolerance=Tolerance(2.0**-52, 8, {}),
        clipping=CLIPPING,
    )


def _reference_step(weights: dict[str, Tensor], hidden_BLD: Tensor, buffer: Tensor) -> Step:
    """Return one step of the full block, whose loss is the mean square of its output."""
    parameters = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    hidden_BLD = hidden_BLD.requires_grad_()
    normed_BLD = hidden_BLD * parameters[NORM]
    inner_BLF = normed_BLD @ parameters[UP].t()
    output_BLD = inner_BLF @ parameters[DOWN].t() + parameters[BIAS]
    loss = output_BLD.square().mean()
    forward = {
        "block input": hidden_BLD,
        "block.norm input": hidden_BLD,
        "block.norm output": normed_BLD,
        "block.up input": normed_BLD,
        "block.up output": inner_BLF,
        "block.down input": inner_BLF,
        "block.down output": output_BLD,
        "block output": output_BLD,
    }
    gradients = torch.autograd.grad(loss, [*forward.values(), *parameters.values()], retain_graph=True)
    backward = dict(zip(forward, gradients, strict=False))
    activations = {key(name): tensor.detach() for name, tensor in forward.items()}
    activations |= {key(name, "backward"): backward[name] for name in reversed(forward)}
    of_parameters = dict(zip(parameters, gradients[len(forward) :], strict=True))
    norm = hypot(*(float(gradient.norm()) for gradient in of_parameters.values()))
    return Step(activations, of_parameters, {}, norm, float(loss.detach()), buffers={BUFFER: buffer})


def _part_of(step: Step, layouts: dict[str, Layout], tp: int, rank: int) -> Step:
    """Return the same step of one rank."""
    activations = {
        each: tensor.chunk(tp, dim=-1)[rank] if f"{each.module} {each.role}" in _CUT_FEATURES else tensor
        for each, tensor in step.activations.items()
    }
    gradients, weights = (_parameter_parts(full, layouts, rank) for full in (step.gradients, step.weights))
    digests = _digests("gradient", gradients) | _digests("parameter", weights) | {("buffer", BUFFER): "the same"}
    return replace(
        step, activations=activations, gradients=gradients, weights=weights, digests=digests, local_gradients={}
    )


def _parameter_parts(full: Any, layouts: dict[str, Layout], rank: int) -> dict[str, Tensor]:
    return {name: layouts[name].local(tensor, rank) for name, tensor in full.items()}


def _digests(kind: str, tensors: dict[str, Tensor]) -> dict[tuple[str, str], str]:
    return {(kind, name): digest(tensor) for name, tensor in tensors.items()}


def with_tensor(
    evidence: Evidence,
    field: str,
    name: Any,
    change: Callable[[Tensor], Tensor | None],
    *,
    ranks: Sequence[int] = (0, 1),
    step: int = 0,
) -> Evidence:
    """Return the evidence with one tensor changed on some ranks: `field` is one of a `Step`, such as `gradients`."""
    changed = [
        replace(part, **{field: {**getattr(part, field), name: change(getattr(part, field)[name])}})
        if rank in ranks
        else part
        for rank, part in enumerate(evidence.candidate[step])
    ]
    steps = list(evidence.candidate)
    steps[step] = tuple(changed)
    return replace(evidence, candidate=tuple(steps))


def with_step(evidence: Evidence, *, step: int = 0, ranks: Sequence[int] = (0, 1), **fields: Any) -> Evidence:
    """Return the evidence with other fields of the candidate's step on some ranks."""
    steps = list(evidence.candidate)
    steps[step] = tuple(
        replace(part, **fields) if rank in ranks else part for rank, part in enumerate(evidence.candidate[step])
    )
    return replace(evidence, candidate=tuple(steps))


def with_digest(evidence: Evidence, item: tuple[str, str], ranks: Sequence[int], *, moment: int) -> Evidence:
    """Return the evidence with another digest of a tensor on some ranks; moment 0 is the start."""

    def changed(facts: RankFacts) -> RankFacts:
        digests = list(facts.digests)
        digests[moment] = {**digests[moment], item: "another"}
        return replace(facts, digests=tuple(digests))

    facts = (changed(facts) if rank in ranks else facts for rank, facts in enumerate(evidence.facts))
    return replace(evidence, facts=tuple(facts))


def suspect(kind: Kind, actual_parts: Sequence[Any], expected: Any = None, **fields: Any) -> Suspect:
    """Return a suspect whose ranks should all hold `expected`, or the parts in `expected_parts`."""
    replicated = {
        "expected": expected,
        "expected_parts": () if expected is None else (expected,) * len(actual_parts),
        "is_replicated": "expected_parts" not in fields,
    }
    numbers = {"check": "any", "where": {"phase": "backward"}, "observed": 0.7, "allowed": 1e-15}
    return Suspect(kind=kind, actual_parts=tuple(actual_parts), **{**numbers, **replicated, **fields})


def cause_of(suspect: Suspect) -> Cause | None:
    """Return the cause that explains a suspect; None where none does."""
    explanation = explain(suspect)
    return explanation.cause if explanation else None
