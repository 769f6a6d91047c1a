"""Reruns the reference with a fused output in another order: is that what the sharded model reads?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from tpcheck.core.placement import Shard
from tpcheck.model.build import Batch, copy_batch
from tpcheck.numerics.checks.activations import ComparedActivation, compare_activations, first_wrong_activations
from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import Evidence, FusedBlocks, TensorKey
from tpcheck.numerics.precision import torch_function_disabled
from tpcheck.numerics.tensors import State, named_tensors
from tpcheck.numerics.tolerance import RECOMPUTED_FACTOR

_MUCH_NEARER = 0.1


def find_blocks_read(
    model: nn.Module, state: State, evidence: Evidence, batch: Batch
) -> dict[TensorKey, tuple[str, FusedBlocks] | None]:
    """Return, of the first wrong input behind right outputs that are cut, the output whose blocks are read wrongly.

    The reference is run with the output in the order in which the ranks read their parts: its input is then that of the
    ranks. With the input, the module of the output; None where it is another mistake; nothing where that is unknown.

    Args:
        state: Parameters and buffers of `model` before the first step.
        batch: The first micro-batch.
    """
    with torch_function_disabled():
        compared = compare_activations(evidence, 0, "forward")
        roots = first_wrong_activations(evidence, 0, compared)
    if not roots or roots[0].role != "input" or roots[0].call or roots[0].micro_batch:
        return {}
    read, is_known = compared.by_key[roots[0]], False
    sources = (compared.by_key.get(source) for source in evidence.reference[0].sources.get(read.key, ()))
    for fused in sources:
        if fused is None or not _may_be_fused(fused, evidence):
            continue
        right = _rerun(model, state, batch, fused.key, fused.expected, read.key)
        if right is None or frobenius_distance(right, read.expected) > read.difference.allowed:
            continue
        is_known = is_known or fused.placed.is_fused
        for number, arranged in _as_read(fused, read.expected.shape[-1]):
            full = _rerun(model, state, batch, fused.key, arranged, read.key)
            if full is not None and _is_read(read, full):
                return {read.key: (fused.key.module, FusedBlocks(number, fused.difference.relative))}
    return {read.key: None} if is_known else {}


def _may_be_fused(fused: ComparedActivation, evidence: Evidence) -> bool:
    """Return whether an activation is a right output whose features are cut, of a module that is called once."""
    key, placement = fused.key, fused.placed.placement
    is_cut = isinstance(placement, Shard) and placement.dim == fused.expected.dim() - 1
    calls = {each.call for each in evidence.reference[0].activations if each.module == key.module}
    return is_cut and key.role == "output" and fused.difference.agrees and calls == {0}


def _as_read(fused: ComparedActivation, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield whole outputs as code may read the ranks' parts, with the number of blocks.

    Parts that are cut block by block may be read in one piece; any parts in halves (gate and up), in thirds, or as
    queries with fewer keys and values.

    Args:
        width: Features of what is computed from them.
    """
    parts, features = fused.placed.parts, fused.expected.shape[-1]
    if fused.placed.is_fused:
        yield fused.placed.num_blocks, torch.cat(parts, dim=-1)
    rest = features - width
    blocks = {(features // 2,) * 2, (features // 3,) * 3, (width, rest // 2, rest // 2)}
    for sizes in sorted(blocks, key=len):
        own = [[size * part.shape[-1] // features for size in sizes] for part in parts]
        if min(sizes) > 0 and all(sum(of_rank) == part.shape[-1] for of_rank, part in zip(own, parts, strict=True)):
            by_rank = [torch.split(part, of_rank, dim=-1) for part, of_rank in zip(parts, own, strict=True)]
            yield len(sizes), torch.cat([piece for block in zip(*by_rank, strict=True) for piece in block], dim=-1)


def _is_read(read: ComparedActivation, full: torch.Tensor) -> bool:
    """Return whether the ranks' parts are those of `full`, by rounding: much nearer than to those of what is right."""
    limit = min(RECOMPUTED_FACTOR * read.difference.allowed, _MUCH_NEARER * read.difference.error)
    return full.shape == read.expected.shape and all(
        frobenius_distance(part, read.placed.expected_part(full, tp_rank)) <= limit
        for tp_rank, part in enumerate(read.placed.parts)
    )


class _ReachedError(Exception):
    """The module whose input is wanted is called."""


def _rerun(
    model: nn.Module, state: State, batch: Batch, fused: TensorKey, value: torch.Tensor, read: TensorKey
) -> torch.Tensor | None:
    """Return the input `read` of the reference where it is given this value for an output; None where it cannot run."""
    modules = dict(model.named_modules())
    if fused.module not in modules or read.module not in modules:
        return None
    inputs: dict[str, torch.Tensor] = {}

    def replaced(module: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"{fused.module} returns {type(output).__name__}")
        return value.clone()

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.update(named_tensors((*args, kwargs) if kwargs else args))
        raise _ReachedError

    handles = [
        modules[fused.module].register_forward_hook(replaced),
        modules[read.module].register_forward_pre_hook(reached, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            functional_call(model, {name: tensor.clone() for name, tensor in state.items()}, (), copy_batch(batch))
    except _ReachedError:
        return inputs.get(read.path)
    except Exception:  # any error of a model that reads this order of blocks as something else
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None
