"""Causes of where things lie: groups, shards that are lost or elsewhere, fused blocks, heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.proof import largest_residual, relative, same_shapes
from tpcheck.numerics.tolerance import LEAST_HEAD_SIZE


def another_group(suspect: Suspect) -> Explanation:
    """A live group is not the declared one, which the check has seen already."""
    return Explanation(Cause.WRONG_GROUP)


def parameters_lost(suspect: Suspect) -> Explanation:
    """The sharded model holds the values under no name, which the check has seen already."""
    return Explanation(Cause.TENSOR_MISSING)


def not_sharded(suspect: Suspect) -> Explanation | None:
    """No parameter at all is sharded."""
    return Explanation(Cause.NOT_SHARDED) if suspect.parameter is None else None


def shard_missing(suspect: Suspect) -> Explanation | None:
    """Some ranks hold nothing, and what is lost would be shards as long as those of the others."""
    if suspect.shards is None:
        return None
    size, sizes = suspect.shards.size, [size for size in suspect.shards.shard_sizes if size]
    num_empty = len(suspect.shards.shard_sizes) - len(sizes)
    is_lost = bool(sizes) and num_empty > 0 and sum(sizes) < size <= sum(sizes) + num_empty * max(sizes)
    return Explanation(Cause.SHARD_MISSING) if is_lost else None


def remainder_lost(suspect: Suspect) -> Explanation | None:
    """All shards are as long as the full dim over the number of ranks, rounded down, which leaves a remainder."""
    if suspect.shards is None:
        return None
    size, sizes = suspect.shards.size, suspect.shards.shard_sizes
    is_lost = set(sizes) == {size // len(sizes)} and size % len(sizes) > 0
    return Explanation(Cause.WRONG_SHARD_BOUNDARY) if is_lost else None


def fused_blocks_interleaved(suspect: Suspect) -> Explanation | None:
    """The module before was cut block by block, and its output is then read in another order."""
    blocks = suspect.fused_blocks
    return None if blocks is None else Explanation(Cause.FUSED_BLOCKS_INTERLEAVED, blocks.error)


def shards_moved(suspect: Suspect) -> Explanation | None:
    """Each rank has the part of another one, or each wrong replica is put together from the parts in another order."""
    actual, expected = suspect.actual_parts, suspect.expected_parts
    if len(actual) < 2 or not expected:
        return None
    limit, tp = largest_residual(suspect), len(actual)
    if not suspect.is_replicated:
        return _explained_by_order(_order(actual, expected, limit))
    if not same_shapes(actual, expected):
        return None
    pairs = list(zip(actual, expected, strict=True))
    wrong = [(part, full) for part, full in pairs if frobenius_distance(part, full) > limit]
    for dim in range(actual[0].dim()):
        if all(part.shape[dim] >= tp and part.shape[dim] % tp == 0 for part, _ in wrong):
            orders = [_order(part.chunk(tp, dim), full.chunk(tp, dim), limit) for part, full in wrong]
            explanation = _explained_by_order(*orders, dim=dim)
            if explanation is not None:
                return explanation
    return None


def _explained_by_order(*orders: list[int] | None, dim: int | None = None) -> Explanation | None:
    """Return the cause that all orders show; an order gives, for each position, the piece that stands there."""
    known = [order for order in orders if order is not None]
    causes = {_cause_of_order(order) for order in known}
    if len(known) < len(orders) or len(causes) != 1 or all(order == sorted(set(order)) for order in known):
        return None
    cause = causes.pop()
    order = known if any(order != known[0] for order in known) else known[0]
    evidence = {"order": order} if dim is None else {"order": order, "dim": dim}
    return None if cause is None else Explanation(cause, evidence=evidence)


def _cause_of_order(order: Sequence[int]) -> Cause | None:
    if sorted(order) == list(range(len(order))):
        return Cause.SHARD_ORDER_SWAPPED
    return Cause.SHARD_REPEATED if all(order[source] == source for source in order) else None


def _order(pieces: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], limit: float) -> list[int] | None:
    """Return which of the expected pieces each piece is, that of its position first; None where one is none of them."""
    order = []
    for position, piece in enumerate(pieces):
        sources = sorted(range(len(expected)), key=lambda source: source != position)
        found = next((source for source in sources if frobenius_distance(piece, expected[source]) <= limit), None)
        if found is None:
            return None
        order.append(found)
    return order


def heads_moved(suspect: Suspect) -> Explanation | None:
    """What goes into a module is right but for the heads, which are others than this rank's.

    Either the tensor has a dim of heads (ALiBi), or it is a result of attention: to the first token attention returns
    the value of one head as it is, under any mask that is causal.
    """
    if suspect.role != "input" or suspect.expected is None or suspect.is_replicated or not suspect.expected_parts:
        return None
    actual, expected, full = suspect.actual_parts, suspect.expected_parts, suspect.expected
    if not same_shapes(actual, expected):
        return None
    shapes = zip(full.shape, *(part.shape for part in actual), strict=True)
    cut = [dim for dim, sizes in enumerate(shapes) if len(set(sizes)) > 1]
    if len(cut) != 1:
        return None
    if cut[0] != full.dim() - 1:
        return _pieces_moved(suspect, actual, expected, full, cut[0], 1)
    if full.dim() != 3:
        return None
    actual, expected = (tuple(part[:, 0] for part in parts) for parts in (actual, expected))
    found = (
        _pieces_moved(suspect, actual, expected, full[:, 0], 1, size)
        for size in _head_sizes([part.shape[-1] for part in actual])
    )
    return next((explanation for explanation in found if explanation is not None), None)


def _head_sizes(widths: Sequence[int]) -> Iterator[int]:
    smallest = min(widths)
    return (size for size in range(smallest, LEAST_HEAD_SIZE - 1, -1) if all(width % size == 0 for width in widths))


def _pieces_moved(
    suspect: Suspect,
    actual_parts: Sequence[torch.Tensor],
    expected_parts: Sequence[torch.Tensor],
    full: torch.Tensor,
    dim: int,
    size: int,
) -> Explanation | None:
    """Name the cause if every piece of `size` along `dim` is one of the expected tensor, and some stand elsewhere."""
    if full.shape[dim] % size:
        return None
    limit = largest_residual(suspect)
    known = _pieces(full, size, dim)
    heads, is_moved, worst = [], False, 0.0
    for actual_part, expected_part in zip(actual_parts, expected_parts, strict=True):
        actual, expected = _pieces(actual_part, size, dim), _pieces(expected_part, size, dim)
        distances, sources = torch.cdist(actual, known, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        if not bool((distances <= limit).all()):
            return None
        is_moved = is_moved or bool(((actual - expected).norm(dim=1) > limit).any())
        worst = max(worst, float(distances.max()))
        heads.append(sources.tolist())
    return Explanation(Cause.HEAD_MAPPING_WRONG, relative(worst, full), {"heads": heads}) if is_moved else None


def _pieces(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Return the pieces of `size` along `dim`, each flat, as rows."""
    return tensor.double().movedim(dim, 0).reshape(tensor.shape[dim] // size, -1)
