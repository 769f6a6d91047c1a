"""Pieces of a computed tensor that stand in other places than they should: shards, heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.explanation import remaining, same_shapes

_LEAST_HEAD = 4  # features; fewer may be found again by chance


def shards_moved(suspect: Suspect) -> Explanation | None:
    """Each rank has the part of another one, or each wrong replica is put together from the parts in another order."""
    if len(suspect.parts) < 2 or not suspect.expected_parts:
        return None
    if not suspect.replicated:
        return _named(suspect, [_order(suspect.parts, suspect.expected_parts, remaining(suspect))])
    if not same_shapes(suspect.parts, suspect.expected_parts):
        return None
    limit, tp = remaining(suspect), len(suspect.parts)
    pairs = [(a, b) for a, b in zip(suspect.parts, suspect.expected_parts, strict=True) if _distance(a, b) > limit]
    for dim in range(suspect.parts[0].dim()):
        if all(actual.shape[dim] >= tp and actual.shape[dim] % tp == 0 for actual, _ in pairs):
            found = _named(suspect, [_order(a.chunk(tp, dim), b.chunk(tp, dim), limit) for a, b in pairs], dim)
            if found is not None:
                return found
    return None


def _named(suspect: Suspect, orders: Sequence[list[int] | None], dim: int | None = None) -> Explanation | None:
    """Return the cause that all orders show; an order tells for each place which piece stands there."""
    causes = set()
    for order in orders:
        if order is None:
            return None
        if sorted(order) == list(range(len(order))):
            causes.add(Cause.SHARD_ORDER_SWAPPED)
        elif all(order[source] == source for source in order):
            causes.add(Cause.SHARD_REPEATED)
        else:
            return None
    if len(causes) != 1 or all(order == sorted(set(order or ())) for order in orders):
        return None
    shown = [order for order in orders if order is not None]
    evidence = {"order": shown if len({tuple(one) for one in shown}) > 1 else shown[0]}
    return Explanation(causes.pop(), 0.0, evidence if dim is None else {**evidence, "dim": dim})


def _order(pieces: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], limit: float) -> list[int] | None:
    """Return which of the expected pieces each piece is, its own if it can be, or None where one is none of them."""
    order = []
    for place, piece in enumerate(pieces):
        nearest = sorted(range(len(expected)), key=lambda one: (_distance(piece, expected[one]) > limit, one != place))
        if not nearest or _distance(piece, expected[nearest[0]]) > limit:
            return None
        order.append(nearest[0])
    return order


def heads_moved(suspect: Suspect) -> Explanation | None:
    """What goes into a module is right but for the heads, which are others than this rank's.

    Either the tensor has a dim of heads (ALiBi), or it is a result of attention: to the first token attention returns
    the value of one head as it is, under any mask that is causal.
    """
    if not str(suspect.where.get("field", "")).startswith("input") or suspect.expected is None:
        return None
    if suspect.replicated or not suspect.expected_parts or not same_shapes(suspect.parts, suspect.expected_parts):
        return None
    shapes = zip(suspect.expected.shape, *(part.shape for part in suspect.parts), strict=True)
    cut = [dim for dim, sizes in enumerate(shapes) if len(set(sizes)) > 1]
    if len(cut) != 1:
        return None
    if cut[0] != suspect.expected.dim() - 1:
        return _found_elsewhere(suspect, suspect.parts, suspect.expected_parts, suspect.expected, cut[0], 1)
    if suspect.expected.dim() != 3:
        return None
    parts = [part[:, 0] for part in suspect.parts]
    expected_parts = [part[:, 0] for part in suspect.expected_parts]
    for size in _head_sizes([part.shape[-1] for part in parts]):
        whole = suspect.expected[:, 0]
        found = _found_elsewhere(suspect, parts, expected_parts, whole, 1, size)
        if found is not None:
            return found
    return None


def _head_sizes(widths: Sequence[int]) -> Iterator[int]:
    smallest = min(widths)
    return (size for size in range(smallest, _LEAST_HEAD - 1, -1) if all(width % size == 0 for width in widths))


def _found_elsewhere(
    suspect: Suspect,
    parts: Sequence[torch.Tensor],
    expected_parts: Sequence[torch.Tensor],
    whole: torch.Tensor,
    dim: int,
    size: int,
) -> Explanation | None:
    """Name the cause if every piece of `size` along `dim` is one of the expected tensor, and some stand elsewhere."""
    if whole.shape[dim] % size or not size:
        return None
    limit = remaining(suspect)
    known = _pieces(whole, size, dim)
    heads, moved, worst = [], False, 0.0
    for part, expected in zip(parts, expected_parts, strict=True):
        pieces = _pieces(part, size, dim)
        own = _pieces(expected, size, dim)
        distances, sources = torch.cdist(pieces, known, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        wrong = (pieces - own).norm(dim=1) > limit
        if bool((distances > limit).any()):
            return None
        moved = moved or bool(wrong.any())
        worst = max(worst, float(distances.max()))
        heads.append(sources.tolist())
    norm = float(torch.linalg.vector_norm(whole.double()))
    return Explanation(Cause.HEAD_MAPPING_WRONG, worst / norm if norm else worst, {"heads": heads}) if moved else None


def _pieces(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Return the pieces of `size` along `dim`, each flat, as rows."""
    return tensor.double().movedim(dim, 0).reshape(tensor.shape[dim] // size, -1)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float(torch.linalg.vector_norm(one.double() - other.double()))
