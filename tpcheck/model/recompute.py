"""Recomputes leaf modules of the reference on the ranks' inputs, so that a second mistake shows behind a first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from tpcheck.core.placement import Shard
from tpcheck.numerics.activation_placement import infer_placement
from tpcheck.numerics.data_flow import is_inside
from tpcheck.numerics.differences import frobenius_distance, rounding_error
from tpcheck.numerics.evidence import Evidence, TensorKey
from tpcheck.numerics.precision import torch_function_disabled
from tpcheck.numerics.tensors import State, named_tensors
from tpcheck.numerics.tolerance import RECOMPUTED_FACTOR

Compute = Callable[[torch.Tensor], torch.Tensor]


def recompute_outputs(model: nn.Module, state: State, evidence: Evidence) -> dict[TensorKey, tuple[torch.Tensor, ...]]:
    """Return the outputs of the reference's leaf modules on the ranks' inputs of the first step, where those are wrong.

    By output, one tensor for each tp_rank. Modules with more than one input are left out. Where parts of the input do
    not give parts of the output (a norm over features that are cut), the whole input is put together.

    Args:
        state: Parameters and buffers of `model` before the first step.
    """
    recomputed: dict[TensorKey, tuple[torch.Tensor, ...]] = {}
    with torch_function_disabled():
        wrong = list(_wrong_inputs(evidence))
    with torch.no_grad():
        for key, inputs in wrong:
            output = replace(key, role="output")
            compute = None if _is_sharded(key.module, evidence) else _leaf_module(model, key.module, state)
            if compute is not None and _works_by_parts(compute, evidence, key, output, inputs):
                recomputed[output] = tuple(compute(part) for part in inputs)
            elif whole := _from_whole_input(model, state, evidence, key, output, inputs):
                recomputed[output] = whole
    return recomputed


def _from_whole_input(
    model: nn.Module,
    state: State,
    evidence: Evidence,
    before: TensorKey,
    after: TensorKey,
    inputs: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Return each rank's part of what a leaf module gives for the ranks' parts of its input put together, if it can."""
    first, outputs = evidence.reference[0].activations, _parts(evidence, after)
    compute = _leaf_module(model, before.module, state)
    if compute is None or outputs is None or after not in first:
        return ()
    placed = infer_placement(first[before].shape, inputs)
    placed_outputs = infer_placement(first[after].shape, outputs)
    if placed is None or placed_outputs is None or not isinstance(placed.placement, Shard):
        return ()
    if not _is_cut_in_order(before.module, evidence):
        return ()
    try:
        whole = compute(torch.cat(list(placed.parts), dim=placed.placement.dim))
    except Exception:  # any error of a module that needs more than this tensor
        return ()
    if whole.shape != first[after].shape:
        return ()
    return tuple(placed_outputs.expected_part(whole, tp_rank) for tp_rank in range(len(outputs)))


def compute_alone(model: nn.Module, state: State, evidence: Evidence) -> dict[TensorKey, tuple[torch.Tensor, ...]]:
    """Return what modules give on each rank's input with its parts of the parameters, where outputs are wrong.

    By output of the first step, one tensor for each tp_rank; without modules that do not run on parts, those with more
    than one input, and those with modules inside, unless their inputs and all inside agree.
    """
    first, modules = evidence.reference[0].activations, dict(model.named_modules())
    wrong = {key for key in first if key.phase == "forward" and not _agrees(evidence, key)}
    alone: dict[TensorKey, tuple[torch.Tensor, ...]] = {}
    for key in first:
        before = replace(key, role="input", path="0")
        inputs, module = _parts(evidence, before), modules.get(key.module)
        if key not in wrong or key.role != "output" or module is None or before not in first or inputs is None:
            continue
        inside = any(other.module != key.module and is_inside(other.module, key.module) for other in wrong)
        if next(module.children(), None) is not None and (inside or before in wrong):
            continue
        try:
            with torch.no_grad():
                computed = [_on_one_rank(module, key, state, evidence, *each) for each in enumerate(inputs)]
        except Exception:  # any error of a module that needs the whole tensor, or more than this one
            continue
        alone[key] = tuple(computed)
    return alone


def _agrees(evidence: Evidence, key: TensorKey) -> bool:
    """Return whether the ranks' parts of a tensor of the first step are the reference's; also where a rank lacks it."""
    expected, parts = evidence.reference[0].activations[key], _parts(evidence, key)
    if parts is None:
        return True
    placed = infer_placement(expected.shape, parts)
    allowed = evidence.tolerance.allowed((0, evidence.dp_rank, key), rounding_error(expected))
    return placed is not None and all(
        frobenius_distance(part, placed.expected_part(expected, tp_rank)) <= allowed
        for tp_rank, part in enumerate(parts)
    )


def _on_one_rank(
    module: nn.Module, key: TensorKey, state: State, evidence: Evidence, tp_rank: int, part: torch.Tensor
) -> torch.Tensor:
    """Return the output `key` of a module on one rank's input, with that rank's parts of the parameters."""
    prefix, parts = f"{key.module}." if key.module else "", evidence.initial_parts[tp_rank]
    full = {path.removeprefix(prefix): tensor for path, tensor in state.items() if path.startswith(prefix)}
    module_state = {path: parts.get(f"{prefix}{path}", tensor).clone() for path, tensor in full.items()}
    of_parts: Any = copy(module)
    if "normalized_shape" in vars(module) and "weight" in module_state:  # of torch's norms, which check it
        of_parts.normalized_shape = tuple(module_state["weight"].shape)
    return dict(named_tensors(functional_call(of_parts, module_state, (part,))))[key.path]


def _wrong_inputs(evidence: Evidence) -> Iterator[tuple[TensorKey, Sequence[torch.Tensor]]]:
    """Yield the single inputs of modules that differ from the reference's on some rank, with each rank's part."""
    first = evidence.reference[0].activations
    inputs: dict[tuple[str, int, int], list[TensorKey]] = {}
    for key in first:
        if (key.phase, key.role) == ("forward", "input"):
            inputs.setdefault((key.module, key.call, key.micro_batch), []).append(key)
    for key, *others in inputs.values():
        parts = _parts(evidence, key)
        if others or key.path != "0" or parts is None:
            continue
        placed = infer_placement(first[key].shape, parts)
        allowed = evidence.tolerance.allowed((0, evidence.dp_rank, key), rounding_error(first[key]))
        if placed is not None and any(
            frobenius_distance(part, placed.expected_part(first[key], tp_rank)) > allowed
            for tp_rank, part in enumerate(parts)
        ):
            yield key, parts


def _parts(evidence: Evidence, key: TensorKey) -> list[torch.Tensor] | None:
    """Return every rank's part of a tensor of the first step; None if a rank lacks it."""
    ranks = evidence.candidate[0]
    return [step.activations[key] for step in ranks] if all(key in step.activations for step in ranks) else None


def _is_sharded(name: str, evidence: Evidence) -> bool:
    """Return whether a parameter of the module itself is sharded."""
    return any(not layout.is_replicated for path, layout in evidence.layouts.items() if path.rpartition(".")[0] == name)


def _is_cut_in_order(name: str, evidence: Evidence) -> bool:
    """Return whether parts of the module's features, one rank's after the other's, are the whole: no fused blocks."""
    cut = [
        layout.placement()
        for path, layout in evidence.layouts.items()
        if path.rpartition(".")[0] == name and not layout.is_replicated
    ]
    return all(isinstance(placement, Shard) and len(placement.sizes) <= 1 for placement in cut)


def _leaf_module(model: nn.Module, name: str, state: State) -> Compute | None:
    """Return a function that runs a leaf module of the reference with its state before the first step."""
    module = dict(model.named_modules()).get(name)
    if module is None or next(module.children(), None) is not None:
        return None
    prefix = f"{name}." if name else ""
    module_state = {path.removeprefix(prefix): tensor for path, tensor in state.items() if path.startswith(prefix)}

    def compute(part: torch.Tensor) -> torch.Tensor:
        output = functional_call(module, {path: tensor.clone() for path, tensor in module_state.items()}, (part,))
        return output if isinstance(output, torch.Tensor) else part.new_empty(0)

    return compute


def _works_by_parts(
    compute: Compute, evidence: Evidence, before: TensorKey, after: TensorKey, inputs: Sequence[torch.Tensor]
) -> bool:
    """Return whether parts of the reference's input give parts of its output."""
    first = evidence.reference[0].activations
    outputs = _parts(evidence, after)
    if after not in first or outputs is None:
        return False
    placed_inputs = infer_placement(first[before].shape, inputs)
    placed_outputs = infer_placement(first[after].shape, outputs)
    if placed_inputs is None or placed_outputs is None:
        return False
    allowed = RECOMPUTED_FACTOR * evidence.tolerance.allowed((0, evidence.dp_rank, after), rounding_error(first[after]))
    for tp_rank in range(len(outputs)):
        try:
            part = compute(placed_inputs.expected_part(first[before], tp_rank))
        except Exception:  # any error of a module that needs the whole tensor, or more than this one
            return False
        if not frobenius_distance(part, placed_outputs.expected_part(first[after], tp_rank)) <= allowed:
            return False
    return True
