"""Linear modules whose gradients are not even what their own inputs and output gradients give."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tpcheck.checks.activations import ComparedActivations
from tpcheck.checks.linear import ROUNDINGS, input_gradient_products, own_weights
from tpcheck.checks.mistaken_gradients import mistaken_gradients
from tpcheck.checks.mistakes import mistakes
from tpcheck.checks.own import unlike_own
from tpcheck.checks.parameters import ComparedParameter
from tpcheck.compare import frobenius_distance
from tpcheck.records import Evidence, Suspect, TensorKey


def own_gradient_suspects(
    evidence: Evidence,
    step: int,
    check: str,
    backward: ComparedActivations,
    wrong: Sequence[ComparedParameter],
    told: Collection[TensorKey | str],
) -> Iterator[Suspect]:
    """Yield column-parallel modules that send back, and weights that get, what their module's own tensors do not give.

    Args:
        wrong: Parameters whose gradient is wrong.
        told: Gradients of activations and names of parameters that are findings already.
    """
    for key in (one.key for one in backward.wrong() if one.key not in told):
        yield from _sent_back(evidence, step, check, backward, key)
    for one in wrong:
        if one.name not in told:
            yield from _of_weight(evidence, step, check, one)


def _sent_back(
    evidence: Evidence, step: int, check: str, backward: ComparedActivations, key: TensorKey
) -> Iterator[Suspect]:
    one = backward.compared[key]
    made = input_gradient_products(evidence, step, key, one.found.allowed)
    if made is None or not one.placed.is_replicated:
        return
    where = {"phase": "backward", "step": step, "module": key.module, "field": f"{key.role} {key.path}"}
    suspect = unlike_own(
        evidence,
        one.placed.parts,
        (made.total,) * len(one.placed.parts),
        one.found,
        check=check,
        kind="input_gradient",
        where=where,
        replicated=True,
    )
    if suspect is not None:
        told = mistakes(made, one.placed.parts, made.total, suspect.allowed_error)
        yield replace(suspect, mistaken=tuple(told))


def _of_weight(evidence: Evidence, step: int, check: str, one: ComparedParameter) -> Iterator[Suspect]:
    own = _own_weight_gradients(evidence, step, one)
    if own is None:
        return
    suspect = unlike_own(
        evidence,
        one.parts,
        own,
        one.found,
        check=check,
        kind="gradient",
        where={"phase": "backward", "step": step, "module": one.module, "parameter": one.name},
        replicated=evidence.layouts[one.name].is_replicated,
    )
    if suspect is not None:
        yield replace(suspect, mistaken=mistaken_gradients(evidence, step, one))


def _own_weight_gradients(evidence: Evidence, step: int, one: ComparedParameter) -> tuple[torch.Tensor, ...] | None:
    """Return what each rank's input and output gradient give for its shard of a weight.

    None where the reference's do not give its gradient (the module is no linear one, or the weight is used elsewhere,
    too), and over DP, where no rank has the inputs of all.
    """
    before = TensorKey("forward", one.module, 0, "input", "0")
    after = TensorKey("backward", one.module, 0, "output", "0")
    whole = _product(evidence.reference[step].activations, before, after)
    if evidence.topology.dp > 1 or whole is None or whole.shape != one.expected.shape:
        return None
    if frobenius_distance(whole, one.expected.double()) > ROUNDINGS * one.found.allowed:
        return None
    held = own_weights(evidence, step, one.name)
    own = [_product(part.activations, before, after) for part in evidence.candidate[step]]
    made = tuple(part for part in own if part is not None)
    shapes = [] if held is None else [part.shape for part in held]
    return made if [part.shape for part in made] == shapes else None


def _product(activations: Any, before: TensorKey, after: TensorKey) -> torch.Tensor | None:
    given, sent = activations.get(before), activations.get(after)
    if given is None or sent is None or given.shape[:-1] != sent.shape[:-1] or given.dim() < 2:
        return None
    product: torch.Tensor = sent.double().flatten(0, -2).t() @ given.double().flatten(0, -2)
    return product
