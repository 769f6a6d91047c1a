"""Which samples a batch holds: digests of its rows, apart from their order and their padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log2

import torch
import xxhash

from tpcheck.batches.leaves import Entry
from tpcheck.core.digests import digest, flat_bytes, in_memory, keys, mix

_MOST_BYTES = 1 << 26  # of one tensor; a cause is looked for once, when batches differ


def contents(tensors: Mapping[str, torch.Tensor], shortest: Mapping[str, Sequence[int]]) -> dict[str, dict[str, str]]:
    """Return digests by path that are equal on ranks whose tensors hold the same samples.

    `rows`: of the rows, in any order. `unpadded`: of the tensor cut to the shortest size on any rank in every dim but
    the first, where the rest is one value (at the end or at the start). `kept`: of what the attention mask beside it
    keeps, padding of any kind aside.

    Args:
        tensors: Those that differ between the ranks, and attention masks, by path.
        shortest: Smallest size of each dim on any rank, by path; the tensor's own where it is absent.
    """
    found: dict[str, dict[str, str]] = {}
    for path, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested or tensor.nbytes > _MOST_BYTES or not tensor.dim():
            continue
        found[path] = {"rows": _rows(tensor)}
        unpadded = _unpadded(tensor, shortest.get(path, tensor.shape))
        if tensor.dim() > 1 and unpadded is not None:
            found[path]["unpadded"] = digest(unpadded)
        mask = tensors.get(_beside(path))
        if mask is not None and 1 < mask.dim() <= tensor.dim() and mask.shape == tensor.shape[: mask.dim()]:
            found[path]["kept"] = _kept(tensor, mask)
    return found


def _rows(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest("".join(sorted(digest(row) for row in tensor)).encode())


def _unpadded(tensor: torch.Tensor, shortest: Sequence[int]) -> torch.Tensor | None:
    """Return the tensor without its padding, None where what is too much is more than that."""
    if len(shortest) != tensor.dim():
        return None
    for dim in range(1, tensor.dim()):
        kept = _cut(tensor, dim, shortest[dim])
        if kept is None:
            return None
        tensor = kept
    return tensor


def _cut(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor | None:
    rest = tensor.shape[dim] - length
    if rest <= 0:
        return tensor
    for start, padding in ((0, tensor.narrow(dim, length, rest)), (rest, tensor.narrow(dim, 0, rest))):
        if padding.numel() and bool((padding == padding.reshape(-1)[0]).all()):
            return tensor.narrow(dim, start, length)
    return None


def _beside(path: str) -> str:
    parent, dot, _ = path.rpartition(".")
    return f"{parent}{dot}attention_mask"


def _kept(tensor: torch.Tensor, mask: torch.Tensor) -> str:
    rows = [row[keep.bool()] for row, keep in zip(tensor, mask, strict=True)]
    return xxhash.xxh3_128_hexdigest("".join(digest(row) for row in rows).encode())


_SAMPLED = 32  # elements of each row, in runs that are spread over it
_RUN = 8  # elements side by side: each run costs one miss of the cache, which is most of what sampling costs
_FEW = 64  # rows that are looked at one by one, 1 microsecond each
_MOST_LEAVES = 4  # that are sampled, the largest first
_MOST_WORDS = _SAMPLED * 16  # of a row: 16 bytes an element
_OF_LEAF = (31, 0xBF58476D1CE4E5B9)  # shift and factor of `mix`, from splitmix64
_OF_ROW = ((29, 0x94D049BB133111EB), (32, 0xBF58476D1CE4E5B9))
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


def sampled_rows(found: Sequence[Entry]) -> Callable[[], bytes] | None:
    """Begin 16 bytes that are the same for batches of the same samples in any order, and return what waits for them.

    Elements of each row of the largest leaves are looked at, so batches of different samples may share them, too.
    Returns None for a batch without rows.
    """
    held = _with_rows(found)[:_MOST_LEAVES]
    if not held:
        return None
    num_rows, device = held[0][0].shape[0], held[0][1].device
    tensors = [tensor for _, tensor in held if tensor.device == device]
    if device.type == "cpu" and num_rows <= _FEW:
        digest = _one_by_one(tensors, num_rows)
        return lambda: digest
    sums = _sums([_in_rows(tensor, num_rows) for tensor in tensors])
    return lambda: sums.cpu().numpy().tobytes()


def samples_of(found: Sequence[Entry]) -> Samples:
    """Return the samples of a batch, in full; reads all of it, row by row."""
    by_path = sorted(_with_rows(found), key=lambda pair: pair[0].path)
    if not by_path:
        return Samples("", (), 0.0)
    held = [(entry, _in_rows(tensor, entry.shape[0])) for entry, tensor in by_path]
    states = [xxhash.xxh3_128() for _ in range(held[0][0].shape[0])]
    for entry, rows in held:
        for state, row in zip(states, rows, strict=True):
            state.update(f"{entry.path} {entry.dtype} {entry.shape[1:]} ".encode())
            state.update(flat_bytes(row).cpu().numpy().data)
    bits = {entry.path: _bits(rows) for entry, rows in held}
    field = max(bits, key=lambda path: bits[path])
    return Samples(field, tuple(state.hexdigest() for state in states), sum(bits.values()))


def _with_rows(found: Sequence[Entry]) -> list[tuple[Entry, torch.Tensor]]:
    """Return what has one row for each sample, as many as the largest has, which comes first."""
    held = [(entry, entry.tensor) for entry in found if entry.tensor is not None and entry.shape]
    held = [(entry, tensor) for entry, tensor in held if tensor.numel() and not tensor.is_meta]
    held.sort(key=lambda pair: -pair[1].nbytes)
    return [pair for pair in held if pair[0].shape[0] == held[0][0].shape[0]]


def _in_rows(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    return tensor.detach().reshape(num_rows, -1)


def _one_by_one(tensors: Sequence[torch.Tensor], num_rows: int) -> bytes:
    """Return the sum of the digests of a few rows: with caches cold, a tenth of the time that tensors' sums take."""
    runs: list[tuple[memoryview, int, int, int]] = []  # bytes, bytes of a row, where a run starts and ends in it
    for tensor in tensors:
        held = memoryview(in_memory(tensor)).cast("B")
        row = len(held) // num_rows
        element = tensor.element_size()
        if row <= _SAMPLED * element:
            runs.append((held, row, 0, row))
        else:
            runs += [(held, row, start * element, (start + _RUN) * element) for start in _starts(row // element)]
    total = 0
    for number in range(num_rows):
        picked = [held[number * row + start : number * row + stop] for held, row, start, stop in runs]
        total += xxhash.xxh3_128_intdigest(b"".join(picked))
    return (total & (1 << 128) - 1).to_bytes(16, "little")


def _sums(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return two int64 on the tensors' device."""
    total = torch.zeros((), dtype=torch.int64, device=leaves[0].device)
    for number, rows in enumerate(leaves):
        picked = _picked(rows)
        words = picked * keys(rows.device, _MOST_WORDS, number)[: picked.shape[1]]
        total = total + mix(words.sum(1), *_OF_LEAF)
    return torch.stack([mix(total, *of_row).sum() for of_row in _OF_ROW])


def _picked(rows: torch.Tensor) -> torch.Tensor:
    """Return the bits of a few elements of each row, as [rows, words]; words are of 32 bits where they fill them."""
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
    """Return about how many bits of chance are in the sampled elements; rows that are all alike tell nothing."""
    picked = [bytes(row) for row in _picked(rows).cpu().view(torch.uint8).numpy()]
    if len(picked) > 1 and len(set(picked)) == 1:
        return 0.0
    size = rows.element_size()
    elements = Counter(row[start : start + size] for row in picked for start in range(0, len(row), size))
    number = sum(elements.values())
    entropy = -sum(count / number * log2(count / number) for count in elements.values())
    return number * entropy
