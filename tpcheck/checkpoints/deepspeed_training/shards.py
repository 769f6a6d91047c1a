"""One rank's shard of a parameter, as a row-major run of elements that may lie in several files."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from tpcheck.adapters import Extent
from tpcheck.checkpoints.files import Files
from tpcheck.checkpoints.stored import StoredTensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive elements of a stored tensor, counted row by row."""

    tensor: StoredTensor
    start: int
    numel: int

    def read(self, files: Files, start: int, stop: int) -> torch.Tensor:
        """Return elements of this segment, flat."""
        if not self.tensor.shape:
            return self.tensor.read(files, range(1)).reshape(-1)
        width = prod(self.tensor.shape[1:])
        first, last = self.start + start, self.start + stop
        rows = range(first // width, -(-last // width))
        flat = self.tensor.read(files, rows).reshape(-1)
        return flat[first - rows.start * width : last - rows.start * width]

    def extent(self) -> Extent | None:
        whole = self.tensor.extent()
        if whole is None:
            return None
        size = self.tensor.dtype.itemsize
        return Extent(whole.path, whole.offset + self.start * size, self.numel * size)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one TP rank holds of a parameter.

    Attributes:
        shape: Its shape on that rank.
        segments: Its elements in order; the partitions of ZeRO, or one tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, tensor: StoredTensor) -> Shard:
        return cls(tensor.shape, tensor.dtype, (Segment(tensor, 0, prod(tensor.shape)),))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def read(self, files: Files, start: int, stop: int) -> torch.Tensor:
        """Return elements counted row by row, flat."""
        parts, at = [], 0
        for segment in self.segments:
            first, last = max(start - at, 0), min(stop - at, segment.numel)
            if first < last:
                parts.append(segment.read(files, first, last))
            at += segment.numel
        if not parts:
            return torch.empty(0, dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extent(self) -> Extent | None:
        """Return where it lies, if in one piece."""
        held = [segment for segment in self.segments if segment.numel]
        return held[0].extent() if len(held) == 1 else None
