"""Where one leaf differs between the ranks of a group: first index, values, number of samples and elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import xxhash

from tpcheck.batches.comparison import LeafDifference
from tpcheck.batches.leaves import LeafContent
from tpcheck.core.digests import flat_bytes
from tpcheck.world.exchange import Exchange

_DIGEST_BLOCK_BYTES = 1 << 12  # of the blocks whose digests are compared first; more where there would be too many
_MAX_BLOCKS = 1 << 16
_MAX_BYTES_PER_SEND = 1 << 22
_MAX_TEXT = 80  # characters of a value: an encoded image is a text, too


@dataclass(frozen=True, slots=True)
class _Counts:
    """How much of a leaf differs on one rank from the reference; `first` is an index into the flat tensor."""

    elements: int = 0
    samples: int = 0
    first: int | None = None


def locate(exchange: Exchange, contents: Sequence[LeafContent], difference: LeafDifference) -> dict[str, Any]:
    """Return evidence on a leaf whose bits alone differ; collective. Only the blocks that differ are sent.

    Reads the leaf a second time; if the step changed it in place, the difference may be gone.
    """
    leaf = next((leaf for leaf in contents if leaf.path == difference.path), None)
    if difference.differs != "bits" or leaf is None:
        return {}
    if leaf.tensor is None:
        return {"values": _by_rank(exchange, difference, leaf.text.decode(errors="replace")[:_MAX_TEXT])}
    flat = flat_bytes(leaf.tensor)
    blocks = _differing_blocks(exchange, flat, _itemsize(leaf, flat))
    counts = exchange.all_gather_object(_compare_blocks(exchange, leaf, flat, blocks, difference.reference))
    first = min((each.first for each in counts if each.first is not None), default=None)
    if first is None:
        return {}
    size = _itemsize(leaf, flat)
    values = _by_rank(exchange, difference, _value(leaf, flat[first * size : (first + 1) * size].cpu()))
    evidence = {
        "values": values,
        "count_differing": max(each.elements for each in counts),
        "count_total": prod(leaf.shape),
    }
    if not leaf.shape:  # a scalar has neither an index nor samples
        return evidence
    index = [int(position) for position in torch.unravel_index(torch.tensor(first), leaf.shape)]
    return evidence | {
        "index": index,
        "first_sample": index[0],
        "samples_differing": max(each.samples for each in counts),
        "samples_total": leaf.shape[0],
    }


def _differing_blocks(exchange: Exchange, flat: torch.Tensor, itemsize: int) -> list[slice]:
    """Return where the bytes differ on some rank, as slices of whole elements, each of which can be sent at once."""
    size = max(_DIGEST_BLOCK_BYTES, -(-flat.numel() // _MAX_BLOCKS)) // itemsize * itemsize or itemsize
    digests = b"".join(xxhash.xxh3_64_digest(block.cpu().numpy().data) for block in torch.split(flat, size))
    by_rank = exchange.all_gather_object(digests)
    slices: list[slice] = []
    for number in range(-(-flat.numel() // size)):
        if len({of_rank[8 * number : 8 * number + 8] for of_rank in by_rank}) == 1:
            continue
        start, stop = number * size, min((number + 1) * size, flat.numel())
        if slices and slices[-1].stop == start and stop - slices[-1].start <= _MAX_BYTES_PER_SEND:
            start = slices.pop().start
        slices.append(slice(start, stop))
    return slices


def _compare_blocks(
    exchange: Exchange, leaf: LeafContent, flat: torch.Tensor, blocks: list[slice], reference: int
) -> _Counts:
    """Compare this rank's blocks with those of the reference, a few megabytes at a time."""
    size, result = _itemsize(leaf, flat), _Counts()
    samples: set[int] = set()
    row = max(1, prod(leaf.shape[1:]))
    for block in blocks:
        actual = flat[block].cpu()
        expected = actual.clone()
        exchange.broadcast(expected, reference)
        positions = (actual.view(-1, size) != expected.view(-1, size)).any(1).nonzero().flatten() + block.start // size
        if len(positions):
            samples.update((positions // row).unique().tolist())
            first = int(positions[0]) if result.first is None else result.first
            result = replace(result, elements=result.elements + len(positions), first=first)
    return replace(result, samples=len(samples))


def _by_rank(exchange: Exchange, difference: LeafDifference, value: Any) -> dict[str, Any]:
    """Return the values of the reference and of every rank that deviates."""
    values = dict(zip(exchange.ranks, exchange.all_gather_object(value), strict=True))
    return {f"rank {rank}": values[rank] for rank in difference.shown_ranks}


def _itemsize(leaf: LeafContent, flat: torch.Tensor) -> int:
    return flat.numel() // prod(leaf.shape)


def _value(leaf: LeafContent, bits: torch.Tensor) -> Any:
    """Return one element as a number, with its bits where numbers alone may look the same."""
    if leaf.kind == "array":
        import numpy

        try:
            number = bits.numpy().view(numpy.dtype(leaf.dtype))[0].item()
        except (TypeError, ValueError):  # a structured dtype
            return bits.numpy().tobytes().hex()
    else:
        assert leaf.tensor is not None
        number = bits.clone().view(leaf.tensor.dtype)[0].item()
    special = isinstance(number, float) and (number != number or number == 0)
    return f"{number} (bits {bits.numpy()[::-1].tobytes().hex()})" if special else number
