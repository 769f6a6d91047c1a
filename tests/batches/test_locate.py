"""How the first value that differs is shown, and what one rank counts against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.batches.threads import run_on_threads
from tpcheck import Topology
from tpcheck.batches import locate as locate_module
from tpcheck.batches.comparison import leaf_differences
from tpcheck.batches.leaves import DigestedBatch, leaf_contents
from tpcheck.batches.locate import _differing_blocks, _value, locate
from tpcheck.batches.records import BatchSummary
from tpcheck.batches.rounds import Peers
from tpcheck.core.digests import flat_bytes


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        (torch.tensor([7]), 7),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor([True]), True),
        (torch.tensor([-0.0]), "-0.0 (bits 80000000)"),
        (torch.tensor([float("nan")]), "nan (bits 7fc00000)"),
        (np.array([1.5]), 1.5),
        (np.array(["a"]), "a"),
    ],
    ids=str,
)
def test_a_value_is_shown_with_its_bits_where_numbers_look_the_same(batch: Any, shown: Any) -> None:
    (leaf,) = leaf_contents(batch)
    assert leaf.tensor is not None
    assert _value(leaf, flat_bytes(leaf.tensor)) == shown


def located(*batches: Any, read_again: Callable[[Any], Any] = lambda batch: batch) -> dict[str, Any]:
    """Return what is found on the first difference of one batch for each rank.

    Args:
        read_again: Returns what a rank has by the time that its batch is read a second time.
    """
    summaries = {rank: BatchSummary(leaves=DigestedBatch(batch).leaves) for rank, batch in enumerate(batches)}
    first, *_ = leaf_differences(summaries)

    def on_rank(peers: Peers) -> dict[str, Any]:
        return locate(peers.tp, leaf_contents(read_again(batches[peers.groups.rank])), first)

    evidence, *others = run_on_threads(Topology(tp=len(batches)), on_rank)
    assert all(other == evidence for other in others)
    return evidence


def changed(tensor: torch.Tensor, *indices: tuple[int, ...]) -> torch.Tensor:
    tensor = tensor.clone()
    for index in indices:
        tensor[index] += 1
    return tensor


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int8])
def test_the_first_element_that_differs_and_the_numbers_of_elements_and_samples_are_found(dtype: torch.dtype) -> None:
    right = torch.arange(24).to(dtype).reshape(4, 3, 2)
    wrong = changed(right, (1, 2, 1), (1, 2, 0), (3, 0, 0))
    assert located(right, right, wrong) == {
        "values": {"rank 0": 10, "rank 2": 11},
        "count_differing": 3,
        "count_total": 24,
        "index": [1, 2, 0],
        "first_sample": 1,
        "samples_differing": 2,
        "samples_total": 4,
    }


def test_of_several_ranks_that_deviate_the_first_index_and_the_largest_counts_are_shown() -> None:
    right = torch.zeros(5, 2, dtype=torch.int64)
    wrong = changed(right, (4, 0), (3, 1), (4, 1)), changed(right, (2, 0))
    evidence = located(right, wrong[0], right, wrong[1], right)
    assert evidence["values"] == {"rank 0": 0, "rank 1": 0, "rank 3": 1}
    assert (evidence["index"], evidence["count_differing"], evidence["samples_differing"]) == ([2, 0], 3, 2)


def test_a_scalar_has_neither_an_index_nor_samples() -> None:
    assert located(torch.tensor(1), torch.tensor(2)) == {
        "values": {"rank 0": 1, "rank 1": 2}, "count_differing": 1, "count_total": 1
    }  # fmt: skip


def test_a_vector_has_a_sample_for_each_element() -> None:
    evidence = located(torch.arange(3), changed(torch.arange(3), (1,), (2,)))
    assert (evidence["index"], evidence["samples_differing"], evidence["samples_total"]) == ([1], 2, 3)


def test_plain_values_are_shown_up_to_80_characters() -> None:
    assert located({"name": "a"}, {"name": "b"}) == {"values": {"rank 0": "'a'", "rank 1": "'b'"}}
    assert {len(value) for value in located("a" * 100, "b" * 100)["values"].values()} == {80}


def test_only_bits_are_located() -> None:
    assert located(torch.zeros(2), torch.zeros(3)) == {}


def test_a_difference_that_the_step_has_undone_is_not_located() -> None:
    assert located(torch.zeros(2), torch.ones(2), read_again=torch.zeros_like) == {}
    assert located({"a": torch.zeros(2)}, {"a": torch.ones(2)}, read_again=lambda batch: {}) == {}


BLOCK = 1 << 12


def blocks(*changes: int, size: int = 5 * BLOCK + 8, itemsize: int = 8) -> list[tuple[int, int]]:
    """Return the blocks that two ranks find to differ, where these bytes do."""
    bits = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    bits[1][list(changes)] = 1
    first, second = run_on_threads(
        Topology(tp=2), lambda peers: _differing_blocks(peers.tp, bits[peers.groups.rank], itemsize)
    )
    assert first == second
    return [(block.start, block.stop) for block in first]


def test_the_blocks_that_differ_are_found_and_adjacent_ones_are_joined() -> None:
    assert blocks(0) == [(0, BLOCK)]
    assert blocks(BLOCK - 1, BLOCK, 3 * BLOCK) == [(0, 2 * BLOCK), (3 * BLOCK, 4 * BLOCK)]
    assert blocks(5 * BLOCK + 7) == [(5 * BLOCK, 5 * BLOCK + 8)]
    assert blocks(5, size=16) == [(0, 16)]


def test_a_block_holds_whole_elements_and_is_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(0, size=3 * 5000, itemsize=5000) == [(0, 5000)]
    assert blocks(0, size=9000, itemsize=12) == [(0, BLOCK // 12 * 12)]
    monkeypatch.setattr(locate_module, "_MAX_BYTES_PER_SEND", 2 * BLOCK)
    assert blocks(*range(0, 5 * BLOCK, BLOCK)) == [(0, 2 * BLOCK), (2 * BLOCK, 4 * BLOCK), (4 * BLOCK, 5 * BLOCK)]
    monkeypatch.setattr(locate_module, "_MAX_BLOCKS", 2)
    assert blocks(0) == [(0, (5 * BLOCK + 8) // 2 // 8 * 8)]
