"""Which samples are in a batch: digests of its rows, whatever their order and their padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log2

import torch
import xxhash

from tpcheck.batches.leaves import LeafContent
from tpcheck.batches.records import ContentDigests
from tpcheck.core.digests import FACTORS, INCREMENT, digest, flat_bytes, in_memory, keys, mix

_MAX_BYTES = 1 << 26  # of one tensor; digested once, when batches differ


def content_digests(
    tensors: Mapping[str, torch.Tensor], smallest: Mapping[str, Sequence[int]]
) -> dict[str, ContentDigests]:
    """Return digests by path that are equal on ranks whose tensors have the same samples in them.

    Args:
        tensors: Those that differ between the ranks, and attention masks, by path.
        smallest: Smallest size of each dim on any rank, by path; the tensor's size where it is absent.
    """
    digests: dict[str, ContentDigests] = {}
    for path, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested or tensor.nbytes > _MAX_BYTES or not tensor.dim():
            continue
        unpadded = _unpadded(tensor, smallest.get(path, tensor.shape)) if tensor.dim() > 1 else None
        mask = tensors.get(_mask_beside(path))
        has_mask = mask is not None and 1 < mask.dim() <= tensor.dim() and mask.shape == tensor.shape[: mask.dim()]
        digests[path] = ContentDigests(
            rows=_rows(tensor),
            unpadded=None if unpadded is None else digest(unpadded),
            unmasked=_unmasked(tensor, mask) if has_mask and mask is not None else None,
        )
    return digests


def _rows(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest("".join(sorted(digest(row) for row in tensor)).encode())


def _unpadded(tensor: torch.Tensor, smallest: Sequence[int]) -> torch.Tensor | None:
    """Return the tensor cut to this size, None where more than padding would be cut off."""
    if len(smallest) != tensor.dim():
        return None
    for dim in range(1, tensor.dim()):
        cut = _cut(tensor, dim, smallest[dim])
        if cut is None:
            return None
        tensor = cut
    return tensor


def _cut(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor | None:
    rest = tensor.shape[dim] - length
    if rest <= 0:
        return tensor
    for start, padding in ((0, tensor.narrow(dim, length, rest)), (rest, tensor.narrow(dim, 0, rest))):
        if padding.numel() and bool((padding == padding.reshape(-1)[0]).all()):
            return tensor.narrow(dim, start, length)
    return None


def _mask_beside(path: str) -> str:
    parent, dot, _ = path.rpartition(".")
    return f"{parent}{dot}attention_mask"


def _unmasked(tensor: torch.Tensor, mask: torch.Tensor) -> str:
    rows = [row[keep.bool()] for row, keep in zip(tensor, mask, strict=True)]
    return xxhash.xxh3_128_hexdigest("".join(digest(row) for row in rows).encode())


_SAMPLED = 32  # elements of each row, in runs that are spread over it
_RUN = 8  # adjacent elements: each run costs one cache miss, which is most of the time of sampling
_MAX_LOOPED_ROWS = 64  # rows that are digested in a Python loop, 1 microsecond each
_MAX_LEAVES = 4  # the largest leaves, which are sampled
_MAX_WORDS = _SAMPLED * 16  # of a row: 16 bytes an element
_OF_LEAF = (31, FACTORS[0])  # shift and factor of `mix`
_OF_ROW = ((29, FACTORS[1]), (32, FACTORS[0]))
_SPREAD = INCREMENT  # spreads the runs without a period that data could have


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of one batch, all of their bytes digested.

    Attributes:
        field: Path of the leaf that identifies samples best.
        rows: Digest of each sample over all leaves that have one row for each.
        bits: How improbable it is that different samples have these digests, in bits; 0 where all rows are equal.
    """

    field: str
    rows: tuple[str, ...]
    bits: float


def sampled_rows(leaves: Sequence[LeafContent]) -> Callable[[], bytes] | None:
    """Start computing 16 bytes that are equal for the same samples in any order, and return what waits for them.

    Only some elements of each row of the largest leaves are read, so batches of different samples may have equal bytes.
    Returns None for a batch without rows.
    """
    largest = _with_rows(leaves)[:_MAX_LEAVES]
    if not largest:
        return None
    num_rows, device = largest[0][0].shape[0], largest[0][1].device
    tensors = [tensor for _, tensor in largest if tensor.device == device]
    if device.type == "cpu" and num_rows <= _MAX_LOOPED_ROWS:
        digest = _looped_sum(tensors, num_rows)
        return lambda: digest
    sums = _sums([_in_rows(tensor, num_rows) for tensor in tensors])
    return lambda: sums.cpu().numpy().tobytes()


def samples_of(leaves: Sequence[LeafContent]) -> Samples:
    """Return the samples of a batch; reads all of it, row by row."""
    by_path = sorted(_with_rows(leaves), key=lambda pair: pair[0].path)
    if not by_path:
        return Samples("", (), 0.0)
    in_rows = [(leaf, _in_rows(tensor, leaf.shape[0])) for leaf, tensor in by_path]
    states = [xxhash.xxh3_128() for _ in range(len(in_rows[0][1]))]
    for leaf, rows in in_rows:
        for state, row in zip(states, rows, strict=True):
            state.update(f"{leaf.path} {leaf.dtype} {leaf.shape[1:]} ".encode())
            state.update(flat_bytes(row).cpu().numpy().data)
    bits = {leaf.path: _bits(rows) for leaf, rows in in_rows}
    field = max(bits, key=lambda path: bits[path])
    return Samples(field, tuple(state.hexdigest() for state in states), sum(bits.values()))


def _with_rows(leaves: Sequence[LeafContent]) -> list[tuple[LeafContent, torch.Tensor]]:
    """Return the leaves with as many rows as the largest has, which comes first."""
    pairs = [(leaf, leaf.tensor) for leaf in leaves if leaf.tensor is not None and leaf.shape]
    pairs = [(leaf, tensor) for leaf, tensor in pairs if tensor.numel() and not tensor.is_meta]
    pairs.sort(key=lambda pair: -pair[1].nbytes)
    return [pair for pair in pairs if pair[0].shape[0] == pairs[0][0].shape[0]]


def _in_rows(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    return tensor.detach().reshape(num_rows, -1)


def _looped_sum(tensors: Sequence[torch.Tensor], num_rows: int) -> bytes:
    """Return the sum of the digests of a few rows: 16 us, 28 with cold caches; `_sums` takes 97 and 153 (4 tensors)."""
    runs: list[tuple[memoryview, int, int, int]] = []  # bytes, bytes of a row, start and end of a run in it
    for tensor in tensors:
        data = memoryview(in_memory(tensor)).cast("B")
        row = len(data) // num_rows
        element = tensor.element_size()
        if row <= _SAMPLED * element:
            runs.append((data, row, 0, row))
        else:
            runs += [(data, row, start * element, (start + _RUN) * element) for start in _starts(row // element)]
    total = 0
    for number in range(num_rows):
        sampled = [data[number * row + start : number * row + stop] for data, row, start, stop in runs]
        total += xxhash.xxh3_128_intdigest(b"".join(sampled))
    return (total & (1 << 128) - 1).to_bytes(16, "little")


def _sums(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return two int64 on the tensors' device."""
    total = torch.zeros((), dtype=torch.int64, device=leaves[0].device)
    for number, rows in enumerate(leaves):
        sampled = _sampled_words(rows)
        words = sampled * keys(rows.device, _MAX_WORDS, number)[: sampled.shape[1]]
        total = total + mix(words.sum(1), *_OF_LEAF)
    return torch.stack([mix(total, *of_row).sum() for of_row in _OF_ROW])


def _sampled_words(rows: torch.Tensor) -> torch.Tensor:
    """Return the bits of a few elements of each row, as [rows, words]: of 32 bits, or bytes where those do not fit."""
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
    if rows.shape[1] > _SAMPLED:
        rows = rows[:, _places(rows.shape[1], rows.device)]
    in_bytes = flat_bytes(rows).view(rows.shape[0], -1)
    if in_bytes.shape[1] % 4:
        return in_bytes
    return (in_bytes.clone() if in_bytes.storage_offset() % 4 else in_bytes).view(torch.int32)


@lru_cache(maxsize=64)
def _places(size: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([start + place for start in _starts(size) for place in range(_RUN)]).to(device)


@lru_cache(maxsize=64)
def _starts(size: int) -> tuple[int, ...]:
    """Return where the runs start in a row of this many elements."""
    return tuple((number * _SPREAD % (1 << 64)) * (size - _RUN) >> 64 for number in range(_SAMPLED // _RUN))


def _bits(rows: torch.Tensor) -> float:
    """Return about how many bits of entropy the sampled elements have; 0 where all rows are equal."""
    sampled = [bytes(row) for row in _sampled_words(rows).cpu().view(torch.uint8).numpy()]
    if len(sampled) > 1 and len(set(sampled)) == 1:
        return 0.0
    size = rows.element_size()
    elements = Counter(row[start : start + size] for row in sampled for start in range(0, len(row), size))
    number = sum(elements.values())
    entropy = -sum(count / number * log2(count / number) for count in elements.values())
    return number * entropy
