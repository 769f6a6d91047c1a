"""One tensor of a checkpoint, read in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from tpcheck.adapters import Checkpoint, Extent

PIECE = 8 << 20  # bytes that are read at once: a few of them in flight stay far below the gigabyte that is promised


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that lies in a checkpoint.

    Attributes:
        checkpoint: Where it lies.
        name: Its name there.
        cast: Floating point values are rounded to this dtype when they are read; None leaves them as they are.
    """

    checkpoint: Checkpoint
    name: str
    cast: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.checkpoint.shape(self.name))

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.checkpoint.dtype(self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what `read` returns."""
        own = self.stored_dtype
        return own if self.cast is None or not own.is_floating_point else self.cast

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_rows(self) -> int:
        """Size of dim 0; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, rows: range) -> torch.Tensor:
        """Return consecutive rows, in the dtype of this tensor; a scalar as it is."""
        return self.checkpoint.read(self.name, rows).to(self.dtype)

    def extent(self) -> Extent | None:
        """Return where these bits lie in a file, if they lie there as they are."""
        return self.checkpoint.extent(self.name) if self.dtype == self.stored_dtype else None

    def pieces(self, rows: range | None = None) -> Iterator[range]:
        """Yield consecutive rows of about `PIECE` bytes, one at least; nothing for an empty tensor."""
        span = range(self.num_rows) if rows is None else rows
        if not self.numel:
            return
        wider = max(self.dtype.itemsize, self.stored_dtype.itemsize)
        step = max(1, PIECE // max(1, self.numel // self.num_rows * wider))
        for start in range(span.start, span.stop, step):
            yield range(start, min(start + step, span.stop))


def bit_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of each element as integers: shape as before, complex ones with a last dim of 2."""
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    plain = plain.resolve_neg().contiguous()
    return plain.view(_INTEGERS[plain.dtype.itemsize])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
