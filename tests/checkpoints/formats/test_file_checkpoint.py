"""Chunks make up a tensor, any rows of it, or the message says how they fail to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck import CheckpointError
from tpcheck.checkpoints.formats.file_checkpoint import Chunk, ChunkedTensor, FileCheckpoint, tensor_from_chunks
from tpcheck.checkpoints.formats.files import Files


@dataclass(frozen=True)
class InMemory:
    """A tensor that needs no file."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def extent(self) -> None:
        return None

    def read(self, files: Files, rows: range) -> torch.Tensor:
        return self.tensor[rows.start : rows.stop]


def chunk(offsets: tuple[int, ...], *shape: int, dtype: torch.dtype = torch.float32) -> Chunk:
    return Chunk(offsets, InMemory(torch.ones(shape, dtype=dtype)))


CHUNKS: dict[str, tuple[list[Chunk], str]] = {
    "overlap": ([chunk((0, 0), 2, 3), chunk((1, 0), 2, 3)], "has chunks that overlap"),
    "overlap in columns": ([chunk((0, 0), 2, 3), chunk((0, 2), 2, 3)], "has chunks that overlap"),
    "the same twice": ([chunk((0,), 2), chunk((0,), 2)], "has chunks that overlap"),
    "two scalars": ([chunk(()), chunk(())], "has chunks that overlap"),
    "a gap": ([chunk((0, 0), 2, 3), chunk((3, 0), 2, 3)], "has chunks that leave out 3 of its 15 elements"),
    "a corner": ([chunk((0, 0), 2, 2), chunk((2, 0), 2, 2), chunk((0, 2), 2, 2)], "leave out 4 of its 16 elements"),
    "two dtypes": ([chunk((0,), 2), chunk((2,), 2, dtype=torch.int32)], "of different dtypes or numbers of dimensions"),
    "two numbers of dims": ([chunk((0,), 2), chunk((2, 0), 2, 2)], "of different dtypes or numbers of dimensions"),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_that_are_not_a_tensor_are_refused(name: str) -> None:
    chunks, message = CHUNKS[name]
    with pytest.raises(CheckpointError, match=f"^Tensor 'a' in folder has .*{message.removeprefix('has ')}.*\\.$"):
        tensor_from_chunks("a", "folder", chunks)


def test_a_checkpoint_whose_file_changes_after_it_was_opened_is_an_error(tmp_path: Path, files: Files) -> None:
    (tmp_path / "a").write_bytes(b"1")
    files.open(tmp_path / "a")
    checkpoint = FileCheckpoint(files, "a file", {}, {})
    checkpoint.require_unchanged()
    (tmp_path / "a").write_bytes(b"12")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.require_unchanged()


def test_empty_chunks_are_ignored() -> None:
    assert tensor_from_chunks("a", "folder", [chunk((0, 0), 2, 3), chunk((2, 0), 0, 3)]).shape == (2, 3)
    assert tensor_from_chunks("a", "folder", [chunk((0, 0), 0, 3)]).shape == (0, 3)


@given(data=st.data())
def test_any_rows_of_any_grid_of_chunks_are_read(data: st.DataObject) -> None:
    full = torch.randn(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    cuts = [sorted({0, size, *data.draw(st.sets(st.integers(0, size), max_size=2))}) for size in full.shape]
    chunks = [
        Chunk((top, left), InMemory(full[top:bottom, left:right]))
        for top, bottom in zip(cuts[0], cuts[0][1:], strict=False)
        for left, right in zip(cuts[1], cuts[1][1:], strict=False)
    ]
    tensor: ChunkedTensor = tensor_from_chunks("a", "folder", data.draw(st.permutations(chunks)))
    start = data.draw(st.integers(0, len(full)))
    stop = data.draw(st.integers(start, len(full)))
    assert torch.equal(tensor.read(Files(), range(start, stop)), full[start:stop])
