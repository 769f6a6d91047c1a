"""A checkpoint as a table of named tensors that lie in files: what most formats come down to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch

from tpcheck.adapters import Extent
from tpcheck.checkpoints.files import Files


class TensorInFiles(Protocol):
    """One tensor, and how to get its elements."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def extent(self) -> Extent | None:
        """Return where it lies in one piece, else None."""

    def read(self, files: Files, rows: range) -> torch.Tensor:
        """Return consecutive indices of dim 0, contiguous; a scalar for any rows."""


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor that lies in one piece."""

    place: Extent
    shape: tuple[int, ...]
    dtype: torch.dtype

    def extent(self) -> Extent | None:
        return self.place

    def read(self, files: Files, rows: range) -> torch.Tensor:
        file = files.open(self.place.path)
        if not self.shape:
            elements = torch.empty((), dtype=self.dtype)
            file.read_into(self.place.offset, elements)
            return elements
        row_nbytes = prod(self.shape[1:]) * self.dtype.itemsize
        elements = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        file.read_into(self.place.offset + rows.start * row_nbytes, elements)
        return elements


@dataclass(frozen=True, slots=True)
class TableCheckpoint:
    """Implements `adapters.Checkpoint` over a table of tensors."""

    files: Files
    description: str
    tensors: Mapping[str, TensorInFiles]
    config: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[frozenset[str], ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    torn: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """In the order in which they lie in the files, since disks read ahead."""
        return tuple(sorted(self.tensors, key=lambda name: _position(self.tensors[name])))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: range) -> torch.Tensor:
        return self.tensors[name].read(self.files, rows)

    def extent(self, name: str) -> Extent | None:
        return self.tensors[name].extent()

    def require_unchanged(self) -> None:
        self.files.require_unchanged()

    def close(self) -> None:
        self.files.close()


def _position(tensor: TensorInFiles) -> tuple[str, int]:
    extent = tensor.extent()
    return ("", 0) if extent is None else (str(extent.path), extent.offset)
