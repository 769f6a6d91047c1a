"""What the reference's own modules make of inputs that went wrong before them: a mistake behind a mistake shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.func import functional_call

from tpcheck.collect import nothing_raised
from tpcheck.compare import frobenius_distance, own_rounding, place
from tpcheck.records import Evidence, TensorKey
from tpcheck.verification.state import State

_ROUNDINGS = 10.0  # a part may round otherwise than in the whole

Remake = Callable[[torch.Tensor], torch.Tensor]


def remade(model: nn.Module, state: State, evidence: Evidence) -> dict[TensorKey, tuple[torch.Tensor, ...]]:
    """Return what leaf modules should have made of the ranks' inputs in the first step, where those were wrong.

    By output, one tensor for each tp_rank. Without modules that are given more than one tensor, or that do not work on
    a rank's part as on the whole.

    Args:
        state: Parameters and buffers of `model` before the first step.
    """
    made: dict[TensorKey, tuple[torch.Tensor, ...]] = {}
    with nothing_raised():
        wrong = list(_wrong_inputs(evidence))
    with torch.no_grad():
        for key, given in wrong:
            output = TensorKey("forward", key.module, key.call, "output", "0")
            remake = None if _is_cut(key.module, evidence) else _remake_of(model, key.module, state)
            if remake is not None and _works_by_parts(remake, evidence, key, output, given):
                made[output] = tuple(remake(part) for part in given)
    return made


def _wrong_inputs(evidence: Evidence) -> Iterator[tuple[TensorKey, Sequence[torch.Tensor]]]:
    """Yield the only inputs of modules that differ from the reference's on some rank, with what each rank gave."""
    first = evidence.reference[0].activations
    inputs: dict[tuple[str, int], list[TensorKey]] = {}
    for key in first:
        if (key.phase, key.role) == ("forward", "input"):
            inputs.setdefault((key.module, key.call), []).append(key)
    for key, *others in inputs.values():
        given = [one.activations.get(key) for one in evidence.candidate[0]]
        parts = [part for part in given if part is not None]
        if others or key.path != "0" or len(parts) < len(given):
            continue
        placed = place(first[key].shape, parts)
        allowed = evidence.tolerance.allowed((0, evidence.dp_rank, key), own_rounding(first[key]))
        if placed is not None and any(
            frobenius_distance(part, placed.expected_part(first[key], tp_rank)) > allowed
            for tp_rank, part in enumerate(parts)
        ):
            yield key, parts


def _is_cut(name: str, evidence: Evidence) -> bool:
    """Return whether a rank holds a shard alone of one of a module's own parameters."""
    return any(not layout.is_replicated for path, layout in evidence.layouts.items() if path.rpartition(".")[0] == name)


def _remake_of(model: nn.Module, name: str, state: State) -> Remake | None:
    """Return what runs a leaf module of the reference as it was at the start."""
    module = dict(model.named_modules()).get(name)
    if module is None or next(module.children(), None) is not None:
        return None
    prefix = f"{name}." if name else ""
    own = {path.removeprefix(prefix): tensor for path, tensor in state.items() if path.startswith(prefix)}

    def remake(given: torch.Tensor) -> torch.Tensor:
        made = functional_call(module, {path: tensor.clone() for path, tensor in own.items()}, (given,))
        return made if isinstance(made, torch.Tensor) else given.new_empty(0)

    return remake


def _works_by_parts(
    remake: Remake, evidence: Evidence, before: TensorKey, after: TensorKey, given: Sequence[torch.Tensor]
) -> bool:
    """Return whether parts of the reference's input give parts of its output."""
    first = evidence.reference[0].activations
    made = [one.activations.get(after) for one in evidence.candidate[0]]
    results = [part for part in made if part is not None]
    if after not in first or len(results) < len(made):
        return False
    entered, left = place(first[before].shape, given), place(first[after].shape, results)
    if entered is None or left is None:
        return False
    allowed = _ROUNDINGS * evidence.tolerance.allowed((0, evidence.dp_rank, after), own_rounding(first[after]))
    for tp_rank in range(len(results)):
        try:
            part = remake(entered.expected_part(first[before], tp_rank))
        except Exception:  # whatever a module says that wants the whole, or more than this tensor
            return False
        if not frobenius_distance(part, left.expected_part(first[after], tp_rank)) <= allowed:
            return False
    return True
