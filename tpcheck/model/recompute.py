"""Recomputes leaf modules of the reference on the ranks' inputs, so that a second mistake shows behind a first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.func import functional_call

from tpcheck.numerics.activation_placement import infer_placement
from tpcheck.numerics.differences import frobenius_distance, rounding_error
from tpcheck.numerics.evidence import Evidence, TensorKey
from tpcheck.numerics.precision import torch_function_disabled
from tpcheck.numerics.tensors import State
from tpcheck.numerics.tolerance import RECOMPUTED_FACTOR

Compute = Callable[[torch.Tensor], torch.Tensor]


def recompute_outputs(model: nn.Module, state: State, evidence: Evidence) -> dict[TensorKey, tuple[torch.Tensor, ...]]:
    """Return the outputs of the reference's leaf modules on the ranks' inputs of the first step, where those are wrong.

    By output, one tensor for each tp_rank. Modules with more than one input are left out, and those for which parts of
    the input do not give parts of the output.

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
    return recomputed


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
