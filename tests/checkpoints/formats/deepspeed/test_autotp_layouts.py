"""Any rows of any parameter that AutoTP's affine maps describe are read from the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint.affine import block_gather_map, replicated_map, segmented_map
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints.reading import same_bits
from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.deepspeed.autotp_layouts import AutoTPLayouts
from tpcheck.checkpoints.formats.deepspeed.merge_tp_shards import (
    LayoutError,
    MergedTensor,
    Shard,
    ShardChunk,
    require_tiling,
)
from tpcheck.checkpoints.formats.files import Files
from tpcheck.checkpoints.formats.torch_files import load

quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def layouts(draw: st.DrawFn) -> Any:
    """Draw a map of one of DeepSpeed's kinds, uneven and empty shares included."""
    tp = draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    kind = draw(st.sampled_from(["segments", "blocks", "replicas"]))
    if kind == "replicas":
        return replicated_map(shape, tp, scale=draw(st.sampled_from([1.0, 0.5])))
    if kind == "blocks":
        size = draw(st.integers(1, 3))
        blocks = draw(st.permutations(range(draw(st.integers(tp, 6)))))
        shape[dim] = len(blocks) * size
        return block_gather_map(shape, {rank: blocks[rank::tp] for rank in range(tp)}, size, dim)
    segments, widths = [], []
    for replicated in draw(st.lists(st.booleans(), min_size=1, max_size=3)):
        if replicated:
            segments.append((draw(st.integers(1, 4)), True))
        else:
            widths.append(draw(st.lists(st.integers(0, 3), min_size=tp, max_size=tp)))
            segments.append((sum(widths[-1]), False))
    shape[dim] = sum(size for size, _ in segments)
    return segmented_map(shape, segments, dim, tp, widths)


def merged(layout: Any, shards: list[torch.Tensor], folder: Path, files: Files) -> MergedTensor:
    """Return the parameter `it` as it is read from a file that holds the shards."""
    torch.save(shards, folder / "shards.pt")
    stored = load(folder / "shards.pt", files, ReadOptions())
    info = {"affine_map": {"version": 1, "params": {"^it$": layout.to_dict()}}}
    whole = AutoTPLayouts(info).merge("it", [Shard.of(one) for one in stored])
    assert whole is not None
    return whole


@quick
@given(layout=layouts(), data=st.data())
def test_any_rows_are_read_from_the_shards(tmp_path: Path, layout: Any, data: st.DataObject) -> None:
    full = torch.randn(layout.logical_shape)
    shards = [layout.extract(full, rank) for rank in layout.shard_shapes]
    files = Files()
    whole = merged(layout, shards, tmp_path, files)
    start = data.draw(st.integers(0, full.shape[0]))
    rows = range(start, data.draw(st.integers(start, full.shape[0])))
    assert whole.shape == full.shape
    assert same_bits(whole.read(files, rows), full[rows.start : rows.stop])
    assert whole.differing_ranks(files) is None
    place = whole.extent()
    if place is not None:
        data_in_file = place.path.read_bytes()[place.offset : place.offset + place.nbytes]
        assert data_in_file == full.numpy().tobytes()
    files.close()


@quick
@given(layout=layouts(), data=st.data())
def test_a_changed_element_of_a_replica_is_found(tmp_path: Path, layout: Any, data: st.DataObject) -> None:
    full = torch.randn(layout.logical_shape)
    shards = [layout.extract(full, rank) for rank in layout.shard_shapes]
    held = [rank for rank, shard in enumerate(shards) if shard.numel()]
    if not held:
        return
    rank = data.draw(st.sampled_from(held))
    element = data.draw(st.integers(0, shards[rank].numel() - 1))
    shards[rank].view(-1)[element] += 1
    files = Files()
    differing = merged(layout, shards, tmp_path, files).differing_ranks(files)
    is_replicated = any(piece.locations > {rank} for piece in _pieces_at(layout, rank, element))
    assert (differing is not None) == is_replicated
    assert differing is None or rank in differing
    files.close()


def _pieces_at(layout: Any, rank: int, element: int) -> list[Any]:
    ids = torch.arange(torch.Size(layout.shard_shapes[rank]).numel())
    return [piece for piece in layout.pieces_by_rank[rank] if element in piece.dest_view(ids)]


def chunk(rows: tuple[int, int], columns: tuple[int, int], tp_rank: int = 0) -> ShardChunk:
    return ShardChunk(tp_rank, range(*rows), range(*columns), start=0, step=columns[1] - columns[0])


TILINGS = {
    "whole": ([chunk((0, 4), (0, 6))], None),
    "replicas": ([chunk((0, 4), (0, 6)), chunk((0, 4), (0, 6), tp_rank=1)], None),
    "quarters": ([chunk((a, a + 2), (b, b + 3)) for a in (0, 2) for b in (0, 3)], None),
    "bricks": ([chunk((0, 2), (0, 2)), chunk((0, 2), (2, 6)), chunk((2, 4), (0, 4)), chunk((2, 4), (4, 6))], None),
    "a hole": ([chunk((0, 4), (0, 3)), chunk((0, 1), (3, 6)), chunk((2, 4), (3, 6))], "leave out row 1"),
    "no end": ([chunk((0, 3), (0, 6))], "leave out row 3"),
    "no start": ([chunk((1, 4), (0, 6))], "leave out row 0"),
    "no last column": ([chunk((0, 4), (0, 5))], "leave out row 0"),
    "twice": ([chunk((0, 4), (0, 6)), chunk((1, 2), (1, 2))], "repeat row"),
    "nothing": ([], "leave out row 0"),
}


@pytest.mark.parametrize("name", TILINGS)
def test_chunks_must_tile_the_tensor(name: str) -> None:
    chunks, why = TILINGS[name]
    if why is None:
        require_tiling(chunks, (4, 6))
    else:
        with pytest.raises(LayoutError, match=why):
            require_tiling(chunks, (4, 6))
