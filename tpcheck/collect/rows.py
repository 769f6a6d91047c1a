"""Which samples a batch holds: digests of its rows that do not depend on their order, and how much they can tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log2

import torch
import xxhash

from tpcheck.collect.batch import Entry
from tpcheck.collect.digest import flat_bytes, keys, mix

_SAMPLED = 32  # elements of each row, in runs that are spread over it
_RUN = 8  # elements side by side: each run costs one miss of the cache, which is most of what sampling costs
_MOST_LEAVES = 4  # that are sampled, the largest first
_SPREAD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: places that fall into no step of the data


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of one batch, in full, for replicas whose sampled digests are the same.

    Attributes:
        field: Path of the leaf that tells most.
        rows: Digest of each sample over all leaves that have one row for each.
        bits: How improbable it is that other samples would look the same, in bits; 0 where they all look alike.
    """

    field: str
    rows: tuple[str, ...]
    bits: float


def sampled_rows(found: Sequence[Entry]) -> torch.Tensor | None:
    """Return two int64 that are the same for batches of the same samples in any order, on the tensors' device.

    Elements of each row of the largest leaves are looked at, so batches of different samples may share it, too.
    Returns None for a batch without rows.
    """
    total: torch.Tensor | None = None
    for number, (_, rows) in enumerate(_row_tensors(found)[:_MOST_LEAVES]):
        picked = _picked(rows)
        words = picked * keys(rows.device, _SAMPLED * 16, number)[: picked.shape[1]]
        own = mix(words.sum(1), 31, 0xBF58476D1CE4E5B9)
        if total is None:
            total = own
        elif own.device == total.device:
            total = total + own
    if total is None:
        return None
    return torch.stack((mix(total, 29, 0x94D049BB133111EB).sum(), mix(total, 32, 0xBF58476D1CE4E5B9).sum()))


def samples_of(found: Sequence[Entry]) -> Samples:
    """Return the samples of a batch, in full; reads all of it, row by row."""
    held = sorted(_row_tensors(found), key=lambda pair: pair[0].path)
    if not held:
        return Samples("", (), 0.0)
    states = [xxhash.xxh3_128() for _ in range(held[0][0].shape[0])]
    for entry, rows in held:
        for state, row in zip(states, rows, strict=True):
            state.update(f"{entry.path} {entry.dtype} {entry.shape[1:]} ".encode())
            state.update(flat_bytes(row).cpu().numpy().data)
    bits = {entry.path: _bits(rows) for entry, rows in held}
    field = max(bits, key=lambda path: bits[path])
    return Samples(field, tuple(state.hexdigest() for state in states), sum(bits.values()))


def _row_tensors(found: Sequence[Entry]) -> list[tuple[Entry, torch.Tensor]]:
    """Return what has one row for each sample, as [rows, elements]: as many rows as the largest, which comes first."""
    held = [(entry, entry.tensor) for entry in found if entry.tensor is not None and entry.shape]
    held = [(entry, tensor) for entry, tensor in held if tensor.numel() and not tensor.is_meta]
    held.sort(key=lambda pair: -pair[1].nbytes)
    num_rows = held[0][0].shape[0] if held else 0
    return [(entry, tensor.detach().reshape(num_rows, -1)) for entry, tensor in held if entry.shape[0] == num_rows]


def _picked(rows: torch.Tensor) -> torch.Tensor:
    """Return the bits of a few elements of each row, as [rows, words]; words are of 32 bits where they fill them."""
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
    if rows.shape[1] > _SAMPLED:
        rows = rows[:, _places(rows.shape[1], rows.device)]
    in_bytes = rows.resolve_neg().contiguous().view(torch.uint8)
    aligned = in_bytes.shape[1] % 4 == 0 and in_bytes.storage_offset() % 4 == 0
    return in_bytes.view(torch.int32) if aligned else in_bytes


@lru_cache(maxsize=64)
def _places(size: int, device: torch.device) -> torch.Tensor:
    starts = ((number * _SPREAD % (1 << 64)) * (size - _RUN) >> 64 for number in range(_SAMPLED // _RUN))
    return torch.tensor([start + place for start in starts for place in range(_RUN)]).to(device)


def _bits(rows: torch.Tensor) -> float:
    """Return about how many bits of chance are in the sampled elements; rows that are all alike tell nothing."""
    picked = [bytes(row) for row in _picked(rows).cpu().view(torch.uint8).numpy()]
    if len(picked) > 1 and len(set(picked)) == 1:
        return 0.0
    size = rows.element_size()
    elements = Counter(row[start : start + size] for row in picked for start in range(0, len(row), size))
    number = sum(elements.values())
    entropy = -sum(count / number * log2(count / number) for count in elements.values())
    return number * entropy
