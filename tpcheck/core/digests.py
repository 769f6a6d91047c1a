"""Digests of the bits of tensors, computed on the device of each tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import xxhash

# splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
INCREMENT = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of its mixing function
_WORDS = 1 << 20  # words of 32 bits that are summed at once on a device: bounds the products to 8 MiB, the keys to 16
# On a CPU a call of xxhash costs 0.4 us more than its bytes; a sum takes ten times as long for each byte.
_MAX_LOOPED_ROWS = 256
_MIN_LOOPED_BYTES = 4096


def digest(tensor: torch.Tensor) -> str:
    """Return a digest of dtype, shape and bits; NaN equals NaN bit for bit, 0.0 does not equal -0.0."""
    bits = start_digests([tensor])()[0]
    return xxhash.xxh3_128_hexdigest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + bits)


def start_digests(tensors: Sequence[torch.Tensor]) -> Callable[[], Sequence[bytes]]:
    """Start to digest the bits of strided tensors, and return a function that waits for the digests, 16 bytes each.

    Changes to the tensors after this call, in the order of their device's stream, have no effect. Digests are
    comparable between tensors of one dtype and size on one type of device.
    """
    fetch = _fetch([_sums(tensor) for tensor in tensors if not tensor.is_cpu])
    on_cpu = [xxhash.xxh3_128_digest(in_memory(tensor)) if tensor.is_cpu else b"" for tensor in tensors]

    def finish() -> list[bytes]:
        fetched = iter(fetch())
        return [known or xxhash.xxh3_128_digest(next(fetched)) for known in on_cpu]

    return finish


class BlockDigest:
    """The digest of a tensor on the CPU, as of `start_digests`, taken of blocks while these are in the cache.

    Args:
        tensor: Not changed until `digest` is called.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        is_plain = type(tensor) is torch.Tensor and tensor.is_contiguous()
        self._next = tensor.data_ptr() if is_plain else 0
        self._end = self._next + tensor.nbytes
        self._hash = xxhash.xxh3_128()

    def update(self, block: torch.Tensor) -> None:
        """Read a block, if it is what follows the blocks read before."""
        if block.data_ptr() == self._next and block.is_contiguous():
            self._hash.update(in_memory(block))
            self._next += block.nbytes

    def digest(self) -> bytes:
        """Return the 16 bytes; read the whole tensor where the blocks were not all of it."""
        if self._next == self._end:
            return self._hash.digest()
        return xxhash.xxh3_128_digest(in_memory(self._tensor))


def start_row_digests(tensors: Sequence[torch.Tensor], num_rows: int) -> Callable[[], Sequence[bytes]]:
    """Start to digest each row of strided tensors, and return a function that waits for them: 16 bytes a row, joined.

    Args:
        tensors: Of `num_rows` rows each, as many elements in every row.
        num_rows: At least 1.

    As for `start_digests`: later changes have no effect, and digests are comparable between equal shapes.
    """
    looped = [
        tensor.is_cpu and (num_rows <= _MAX_LOOPED_ROWS or tensor.nbytes >= _MIN_LOOPED_BYTES * num_rows)
        for tensor in tensors
    ]
    pairs = list(zip(tensors, looped, strict=True))
    fetch = _fetch([_row_sums(tensor, num_rows) for tensor, is_looped in pairs if not is_looped])
    in_loops = [_looped_rows(tensor, num_rows) if is_looped else b"" for tensor, is_looped in pairs]

    def finish() -> list[bytes]:
        fetched = iter(fetch())
        return [known or next(fetched) for known in in_loops]

    return finish


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a strided tensor, element by element, on its device; a view where that is possible."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    return plain.resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def keys(device: torch.device, number: int, stream: int) -> torch.Tensor:
    """Return `number` odd pseudo-random integers of 64 bits, the same in every process."""
    made, is_made = _kept_keys(device, number, stream)
    if is_made is not None:  # they may have been started on another stream of CUDA
        torch.cuda.current_stream(device).wait_event(is_made)
    return made


@lru_cache(maxsize=64)  # two for each device of one process
def _kept_keys(device: torch.device, number: int, stream: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    made = odd_keys(stream * number, number, device)
    return made, _event_now(device) if made.is_cuda else None


def _event_now(device: torch.device) -> torch.cuda.Event:
    """Return an event that comes when the work that the device's current stream has now is done."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def odd_keys(first: int, number: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the odd pseudo-random integers of 64 bits of the positions `first`, `first` + 1, ... (splitmix64)."""
    return splitmix(torch.arange(first, first + number, device=device)) | 1


def splitmix(numbers: torch.Tensor) -> torch.Tensor:
    """Return a pseudo-random integer of 64 bits for each integer (splitmix64); use the high bits, which mix best."""
    return mix(mix(numbers * _signed(INCREMENT), 30, FACTORS[0]), 27, FACTORS[1])


def mix(numbers: torch.Tensor, shift: int, factor: int) -> torch.Tensor:
    """Return (x ^ x >> shift) * factor in 64 bits, for each x; one round of splitmix64's mixing function."""
    logical = (numbers >> shift) & ((1 << (64 - shift)) - 1)
    return (numbers ^ logical) * _signed(factor)


def _sums(tensor: torch.Tensor) -> torch.Tensor:
    """Return two multilinear sums of the tensor's words for each chunk of it, as int64 on its device.

    The key of each index is odd, so a change of one word changes the sum; two tensors share both sums of a chunk with
    probability 2^-62 (Lemire, Kaser: Strongly universal string hashing is fast, arXiv 1202.4961).
    """
    if tensor.is_meta:  # has no bits
        return torch.zeros(0, dtype=torch.int64)
    flat = flat_bytes(tensor)
    if flat.numel() % 4 or flat.storage_offset() % 4:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4))  # callers compare shapes, too
    sums = [
        (words * keys(tensor.device, _WORDS, stream)[: words.numel()]).sum()
        for words in torch.split(flat.view(torch.int32), _WORDS)
        for stream in (0, 1)
    ]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=tensor.device)


def _looped_rows(tensor: torch.Tensor, num_rows: int) -> bytes:
    data = memoryview(in_memory(tensor)).cast("B")
    size = len(data) // num_rows
    return b"".join([xxhash.xxh3_128_digest(data[start : start + size]) for start in range(0, len(data), size)])


def _row_sums(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return two int64 for each row, as `_sums` does for a tensor; one after the other."""
    rows = flat_bytes(tensor).view(num_rows, -1)
    if rows.shape[1] % 4 or rows.storage_offset() % 4:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    totals = torch.zeros(2, num_rows, dtype=torch.int64, device=tensor.device)
    for words in torch.split(rows.view(torch.int32), max(1, _WORDS // num_rows), dim=1):
        for stream in (0, 1):
            summed = (words * keys(tensor.device, _WORDS, stream)[: words.shape[1]]).sum(1)
            totals[stream] = mix(totals[stream], 31, FACTORS[0]) + summed
    return totals.t().flatten()


def _fetch(sums: Sequence[torch.Tensor]) -> Callable[[], list[bytes]]:
    """Start to copy sums to the host, all at once, and return a function that waits for them."""
    if not sums:
        return list
    sizes = [len(of_tensor) for of_tensor in sums]
    joined = torch.cat([of_tensor.to(sums[0].device) for of_tensor in sums])
    if not joined.is_cuda:
        return lambda: [part.numpy().tobytes() for part in torch.split(joined.cpu(), sizes)]
    host = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
    host.copy_(joined, non_blocking=True)
    copied = _event_now(joined.device)

    def finish() -> list[bytes]:
        copied.synchronize()
        return [part.numpy().tobytes() for part in torch.split(host, sizes)]

    return finish


def in_memory(tensor: torch.Tensor) -> Any:
    """Return a buffer of the bytes that `flat_bytes` returns, for a tensor on the CPU, without a copy if possible.

    The buffer at `data_ptr()` needs no NumPy, and takes 2 us less for each tensor than a view of it (0.6 against 2.5 us
    for a digest of 64 elements).
    """
    if type(tensor) is not torch.Tensor or not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
        return flat_bytes(tensor).numpy().data
    size = tensor.nbytes
    return _bytes_type(size).from_address(tensor.data_ptr()) if size else b""


@lru_cache(maxsize=256)  # making a type takes longer than to digest a small tensor
def _bytes_type(size: int) -> Any:
    return ctypes.c_char * size


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
