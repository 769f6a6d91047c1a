"""A checkpoint as a table of named tensors in files, each in one piece or in chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch

from tpcheck.backends.checkpoint_format import Extent, TrainingStates
from tpcheck.checkpoints.formats.files import Files, shortened
from tpcheck.core.errors import CheckpointError


class TensorInFiles(Protocol):
    """A tensor, and how to read its elements."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def extent(self) -> Extent | None:
        """Return where it lies, or None where it does not lie in one piece."""

    def read(self, files: Files, rows: range) -> torch.Tensor:
        """Return consecutive indices of dim 0, contiguous; a scalar for any rows."""


@dataclass(frozen=True, slots=True)
class ContiguousTensor:
    """A tensor that lies in one piece."""

    place: Extent
    shape: tuple[int, ...]
    dtype: torch.dtype

    def extent(self) -> Extent | None:
        return self.place

    def read(self, files: Files, rows: range) -> torch.Tensor:
        shape = (len(rows), *self.shape[1:]) if self.shape else ()
        skipped = rows.start * prod(self.shape[1:]) * self.dtype.itemsize if self.shape else 0
        return files.open(self.place.path).read_tensor(self.place.offset + skipped, shape, self.dtype)


@dataclass(frozen=True, slots=True)
class FileCheckpoint:
    """Implements `Checkpoint` over a table of tensors."""

    files: Files
    description: str
    tensors: Mapping[str, TensorInFiles]
    config: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[frozenset[str], ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    inconsistent_replicas: Mapping[str, str] = field(default_factory=dict)
    read_states: Callable[[], TrainingStates | None] | None = None

    def training_states(self) -> TrainingStates | None:
        return None if self.read_states is None else self.read_states()

    def names(self) -> tuple[str, ...]:
        """Return all names in the order of the files, since disks read ahead."""
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, and the indices at which it starts in the whole."""

    offsets: tuple[int, ...]
    tensor: TensorInFiles

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offsets, self.tensor.shape, strict=True))


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor made of chunks that hold every element once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def extent(self) -> Extent | None:
        return self.chunks[0].tensor.extent() if len(self.chunks) == 1 else None

    def read(self, files: Files, rows: range) -> torch.Tensor:
        if len(self.chunks) == 1:
            return self.chunks[0].tensor.read(files, rows)
        tensor = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for chunk in self.chunks:
            start, end = max(rows.start, chunk.offsets[0]), min(rows.stop, chunk.ends[0])
            if start < end:
                columns = (slice(*ends) for ends in zip(chunk.offsets[1:], chunk.ends[1:], strict=True))
                in_chunk = range(start - chunk.offsets[0], end - chunk.offsets[0])
                place = (slice(start - rows.start, end - rows.start), *columns)
                tensor[place] = chunk.tensor.read(files, in_chunk)
        return tensor


def tensor_from_chunks(name: str, where: object, chunks: Sequence[Chunk]) -> ChunkedTensor:
    """Return the tensor that the chunks make up.

    It is as large as the chunks reach, since nothing else states its shape: without its last chunk it is smaller.

    Args:
        name: The name of the tensor, for error messages.
        where: The files that hold the chunks, for error messages.

    Raises:
        CheckpointError: The chunks overlap, leave a gap, or do not fit each other.
    """
    tensor, first = f"Tensor {shortened(name)} in {where}", chunks[0].tensor
    if any(len(chunk.tensor.shape) != len(first.shape) or chunk.tensor.dtype != first.dtype for chunk in chunks):
        raise CheckpointError(f"{tensor} has chunks of different dtypes or numbers of dimensions.")
    shape = tuple(max(ends) for ends in zip(*(chunk.ends for chunk in chunks), strict=True))
    filled = [chunk for chunk in chunks if prod(chunk.tensor.shape)] or list(chunks[:1])
    if _any_overlap(filled):
        raise CheckpointError(f"{tensor} has chunks that overlap.")
    missing = prod(shape) - sum(prod(chunk.tensor.shape) for chunk in filled)
    if missing:
        raise CheckpointError(f"{tensor} has chunks that leave out {missing} of its {prod(shape)} elements.")
    return ChunkedTensor(shape, first.dtype, tuple(filled))


def _any_overlap(chunks: Sequence[Chunk]) -> bool:
    """Return whether two chunks share an element; compare each with those that start before it ends in dim 0."""
    if len(chunks) > 1 and not chunks[0].offsets:
        return True
    in_order = sorted(chunks, key=lambda chunk: chunk.offsets)
    for position, chunk in enumerate(in_order):
        for later in in_order[position + 1 :]:
            if later.offsets[0] >= chunk.ends[0]:
                break
            if all(start < end for start, end in zip(later.offsets, chunk.ends, strict=True)) and all(
                start < end for start, end in zip(chunk.offsets, later.ends, strict=True)
            ):
                return True
    return False
