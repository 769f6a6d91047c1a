"""Reads the chunks of torch.distributed.checkpoint: each is a whole file of `torch.save` within a larger file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tpcheck.adapters import Extent, ReadOptions
from tpcheck.checkpoints.boxes import Box, BoxedTensor, put_together
from tpcheck.checkpoints.dcp_metadata import Chunk, SavedTensor
from tpcheck.checkpoints.files import Files, OpenFile, shortened
from tpcheck.checkpoints.pickles import load
from tpcheck.checkpoints.stored import StoredTensor
from tpcheck.errors import CheckpointError


def put_chunks_together(folder: Path, name: str, saved: SavedTensor, files: Files) -> BoxedTensor:
    """Return the tensor that the chunks are.

    Raises:
        CheckpointError: They overlap, leave a gap, or are no part of their file.
    """
    chunks = [LazyChunk(name, saved.dtype, chunk) for chunk in saved.chunks]
    for one in saved.chunks:
        size = files.open(one.path).size
        if one.start + one.nbytes > size:
            raise CheckpointError(
                f"{one.path} has {size} bytes, and the chunk of {shortened(name)} in it ends at byte "
                f"{one.start + one.nbytes}."
            )
    if not chunks:
        raise CheckpointError(f"{folder} holds no chunk of {shortened(name)}.")
    try:
        whole = put_together([Box(one.place.offsets, one) for one in chunks])
    except CheckpointError as error:
        raise CheckpointError(f"Tensor {shortened(name)} in {folder} {error}.") from error
    if whole.shape != saved.shape:
        raise CheckpointError(
            f"{folder} holds chunks of {shortened(name)} that make up shape {list(whole.shape)} of {list(saved.shape)}."
        )
    if len(chunks) > 1:
        return whole
    only = whole.boxes[0]
    return replace(whole, boxes=(Box(only.offsets, chunks[0].opened(files)),))


@dataclass(frozen=True, slots=True)
class LazyChunk:
    """A chunk whose own table of contents is read when its elements are: a model may have 100,000 of them."""

    name: str
    dtype: torch.dtype
    place: Chunk

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.sizes

    def extent(self) -> Extent | None:
        return None

    def read(self, files: Files, rows: range) -> torch.Tensor:
        return self.opened(files).read(files, rows)

    def opened(self, files: Files) -> StoredTensor:
        """Return where its elements lie.

        Raises:
            CheckpointError: It is no such tensor as the metadata says.
        """
        whole = files.open(self.place.path)
        where = f"The chunk of {shortened(self.name)} at byte {self.place.start} of {self.place.path}"
        try:
            tensor = load(whole.path, _PartAlone(_Part(whole, self.place.start, self.place.nbytes)), ReadOptions())
        except CheckpointError as error:
            raise CheckpointError(f"{where} is no tensor that torch saved, or a damaged one.") from error
        if not isinstance(tensor, StoredTensor) or (tensor.shape, tensor.dtype) != (self.shape, self.dtype):
            found = f"{list(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, StoredTensor) else "no tensor"
            raise CheckpointError(f"{where} is {found}, and the metadata says {list(self.shape)} of {self.dtype}.")
        if tensor.storage.offset is None:
            raise CheckpointError(f"{where} has no elements.")
        return replace(tensor, storage=replace(tensor.storage, offset=tensor.storage.offset + self.place.start))


class _Part(OpenFile):
    """A part of an open file, read as if it were a file."""

    __slots__ = ("_start", "_whole")

    def __init__(self, whole: OpenFile, start: int, nbytes: int) -> None:
        self.path, self.size = whole.path, nbytes
        self._whole, self._start = whole, start
        self._descriptor = None

    def read(self, offset: int, nbytes: int) -> bytearray:
        self._require_range(offset, nbytes)
        return self._whole.read(self._start + offset, nbytes)


class _PartAlone(Files):
    """Opens nothing but the part."""

    def __init__(self, part: _Part) -> None:
        super().__init__()
        self._part = part

    def open(self, path: Path) -> OpenFile:
        return self._part
