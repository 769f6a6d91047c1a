"""Where one leaf differs between the ranks of a group: first index, values, how many samples and elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import xxhash

from tpcheck.batches.comparison import FieldDifference
from tpcheck.batches.leaves import Entry
from tpcheck.core.digests import flat_bytes
from tpcheck.world.exchange import Exchange

_BLOCK = 1 << 12  # bytes whose digests are compared first; larger where there would be too many blocks
_MOST_BLOCKS = 1 << 16
_CHUNK = 1 << 22  # bytes that travel at once
_TEXT = 80  # characters of a value


@dataclass(frozen=True, slots=True)
class _Found:
    elements: int = 0
    samples: int = 0
    first: int | None = None  # element, counted flat


def locate(exchange: Exchange, found: Sequence[Entry], difference: FieldDifference) -> dict[str, Any]:
    """Return evidence on a leaf whose bits alone differ; collective. Only the blocks that differ travel.

    The leaf is looked at again: where a step has changed it in place since, nothing may be found.
    """
    entry = next((entry for entry in found if entry.path == difference.path), None)
    if difference.what != "bits" or entry is None:
        return {}
    if entry.tensor is None:
        return {"values": _by_rank(exchange, difference, entry.text.decode(errors="replace")[:_TEXT])}
    flat = flat_bytes(entry.tensor)
    blocks = _differing_blocks(exchange, flat, _itemsize(entry, flat))
    here = _compared(exchange, entry, flat, blocks, difference.reference)
    answers = exchange.all_gather_object(here)
    first = min((answer.first for answer in answers if answer.first is not None), default=None)
    if first is None:
        return {}
    size = _itemsize(entry, flat)
    values = _by_rank(exchange, difference, _value(entry, flat[first * size : (first + 1) * size].cpu()))
    index = _unravel(first, entry.shape)
    samples = {"first_sample": index[0], "samples_differing": max(answer.samples for answer in answers)}
    return {
        "index": index,
        "values": values,
        "count_differing": max(answer.elements for answer in answers),
        "count_total": prod(entry.shape),
        **(samples | {"samples_total": entry.shape[0]} if entry.shape else {}),
    }


def _differing_blocks(exchange: Exchange, flat: torch.Tensor, itemsize: int) -> list[slice]:
    """Return where the bytes differ on some rank: whole elements, no more of them in one slice than travel at once."""
    size = max(_BLOCK, -(-flat.numel() // _MOST_BLOCKS)) // itemsize * itemsize or itemsize
    digests = b"".join(xxhash.xxh3_64_digest(block.cpu().numpy().data) for block in torch.split(flat, size))
    everybody = exchange.all_gather_object(digests)
    slices: list[slice] = []
    for number in range(-(-flat.numel() // size)):
        if len({of_rank[8 * number : 8 * number + 8] for of_rank in everybody}) == 1:
            continue
        start, stop = number * size, min((number + 1) * size, flat.numel())
        if slices and slices[-1].stop == start and stop - slices[-1].start <= _CHUNK:
            start = slices.pop().start
        slices.append(slice(start, stop))
    return slices


def _compared(exchange: Exchange, entry: Entry, flat: torch.Tensor, blocks: list[slice], reference: int) -> _Found:
    """Compare this rank's blocks with those of the reference, a few megabytes at a time."""
    size, result = _itemsize(entry, flat), _Found()
    samples: set[int] = set()
    row = max(1, prod(entry.shape[1:]))
    for block in blocks:
        own = flat[block].cpu()
        expected = own.clone()
        exchange.broadcast(expected, reference)
        places = (own.view(-1, size) != expected.view(-1, size)).any(1).nonzero().flatten() + block.start // size
        if len(places):
            samples.update((places // row).unique().tolist())
            first = int(places[0]) if result.first is None else result.first
            result = replace(result, elements=result.elements + len(places), first=first)
    return replace(result, samples=len(samples))


def _by_rank(exchange: Exchange, difference: FieldDifference, value: Any) -> dict[str, Any]:
    """Return the values of the reference and of every rank that deviates."""
    values = dict(zip(exchange.ranks, exchange.all_gather_object(value), strict=True))
    ranks = [difference.reference, *(rank for rank in difference.deviating if rank != difference.reference)]
    return {f"rank {rank}": values[rank] for rank in ranks}


def _itemsize(entry: Entry, flat: torch.Tensor) -> int:
    return flat.numel() // prod(entry.shape)


def _value(entry: Entry, bits: torch.Tensor) -> Any:
    """Return one element as a number, with its bits where numbers alone may look the same."""
    if entry.kind == "array":
        import numpy

        try:
            number = bits.numpy().view(numpy.dtype(entry.dtype))[0].item()
        except (TypeError, ValueError):  # a structured dtype
            return bits.numpy().tobytes().hex()
    else:
        assert entry.tensor is not None
        number = bits.clone().view(entry.tensor.dtype)[0].item()
    special = isinstance(number, float) and (number != number or number == 0)
    return f"{number} (bits {bits.numpy()[::-1].tobytes().hex()})" if special else number


def _unravel(flat: int, shape: Sequence[int]) -> list[int]:
    index: list[int] = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return index[::-1]
