"""Which samples are in a batch: digests of its rows, whatever their order and their padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log2

import torch
import xxhash

from tpcheck.batches.leaves import DigestedBatch, LeafContent, has_a_row_for_each, is_text
from tpcheck.batches.records import ContentDigests
from tpcheck.core.digests import INCREMENT, digest, flat_bytes

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


_SAMPLED = 32  # elements of each row whose entropy is measured, in runs that are spread over it
_RUN = 8  # adjacent elements
_SPREAD = INCREMENT  # spreads the runs without a period that data could have


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of one batch.

    Attributes:
        field: Path of the leaf that identifies samples best.
        rows: Of each sample, over all leaves that have one row for each: `DigestedBatch.samples`.
        bits: How improbable it is that different samples have these digests, in bits; 0 where all rows are equal.
        beside: Of what else the batch has: `DigestedBatch.beside_rows` or `beside_texts`.
    """

    field: str
    rows: tuple[int, ...]
    bits: float
    beside: bytes = b""


def any_order(samples: Sequence[int]) -> bytes | None:
    """Return 16 bytes that are equal for the same samples in any order, None where there are none."""
    return (sum(samples) & (1 << 128) - 1).to_bytes(16, "little") if samples else None


def samples_of(batch: DigestedBatch) -> Samples:
    """Return the samples of a batch, and how much they say."""
    in_rows = [leaf for leaf in batch.contents if has_a_row_for_each(leaf, batch.num_samples)]
    if not in_rows:
        return _texts_of(batch)
    bits = {leaf.path: _bits(_in_rows(leaf, batch.num_samples)) for leaf in sorted(in_rows, key=lambda leaf: leaf.path)}
    field = max(bits, key=lambda path: bits[path])
    return Samples(field, batch.samples, sum(bits.values()), batch.beside_rows)


def _texts_of(batch: DigestedBatch) -> Samples:
    """Return the texts of a batch without rows; they say as much as they differ from each other."""
    texts = [leaf for leaf in batch.contents if is_text(leaf)]
    if not batch.rows_or_texts:
        return Samples("", (), 0.0)
    bits = _entropy(Counter(leaf.text for leaf in texts))
    return Samples(texts[0].path, batch.rows_or_texts, bits, batch.beside_texts)


def _entropy(counts: Counter[bytes]) -> float:
    """Return the entropy of all elements together, in bits."""
    number = sum(counts.values())
    return -sum(count * log2(count / number) for count in counts.values())


def _in_rows(leaf: LeafContent, num_rows: int) -> torch.Tensor:
    assert leaf.tensor is not None
    return leaf.tensor.detach().reshape(num_rows, -1)


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
    """Return where the sampled elements of a row of this many are."""
    starts = [(number * _SPREAD % (1 << 64)) * (size - _RUN) >> 64 for number in range(_SAMPLED // _RUN)]
    return torch.tensor([start + place for start in starts for place in range(_RUN)]).to(device)


def _bits(rows: torch.Tensor) -> float:
    """Return about how many bits of entropy the sampled elements have; 0 where all rows are equal."""
    sampled = [bytes(row) for row in _sampled_words(rows).cpu().view(torch.uint8).numpy()]
    if len(sampled) > 1 and len(set(sampled)) == 1:
        return 0.0
    size = rows.element_size()
    elements = Counter(row[start : start + size] for row in sampled for start in range(0, len(row), size))
    return _entropy(elements)
