"""Where the error of a tensor lies, as tiles, and which ranks hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import pytest
import torch

from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Shard
from tpcheck.numerics.error_map import MOST_TILES, error_map
from tpcheck.numerics.evidence import Suspect


def suspect(
    expected: Any, parts: Sequence[Any], cut: Callable[[Any], Sequence[Any]] | None, *, is_replicated: bool = False
) -> Suspect:
    return Suspect(
        check="weights_match_reference",
        where={},
        observed=1.0,
        allowed=0.0,
        kind="weight",
        expected=expected,
        actual_parts=tuple(parts),
        is_replicated=is_replicated,
        cut=cut,
        tp_group=(2, 3),
    )


def evidence(*arguments: Any, **options: Any) -> dict[str, Any]:
    found = error_map(suspect(*arguments, **options))
    assert found is not None
    known: dict[str, Any] = found.as_evidence()["error_map"]
    return known


def test_each_tile_has_its_share_of_the_error() -> None:
    expected = torch.zeros(2, 3)
    expected[0, 0] = 4.0
    layout = Layout.from_placement((2, 3), Shard(0), 2)
    top, bottom = (part.clone() for part in layout.parts(expected))
    bottom[0, 2] += 2.0
    assert evidence(expected, (top, bottom), layout.parts) == {
        "shape": [2, 3],
        "tiles": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.5]],
        "shards": [
            {"ranks": [2], "rows": [0, 1], "columns": [0, 3]},
            {"ranks": [3], "rows": [1, 2], "columns": [0, 3]},
        ],
    }


def test_a_large_tensor_has_few_tiles_whose_squares_add_up() -> None:
    expected = torch.randn(3, 50, 70, dtype=torch.float64)
    layout = Layout.from_placement((3, 50, 70), Shard(2), 2)
    parts = [part + torch.randn_like(part) for part in layout.parts(expected)]
    found = evidence(expected, parts, layout.parts)
    tiles = torch.tensor(found["tiles"], dtype=torch.float64)
    assert tuple(tiles.shape) == (MOST_TILES, MOST_TILES)
    error = (layout.assemble(parts) - expected).norm() / expected.norm()
    assert float(tiles.norm()) == pytest.approx(float(error), rel=1e-2)  # tiles have three digits
    assert found["shards"][1] == {"ranks": [3], "rows": [0, 150], "columns": [35, 70]}


def test_fused_blocks_are_several_rectangles_of_a_rank() -> None:
    expected = torch.randn(8, 4)
    layout = Layout.from_placement((8, 4), Shard(0, blocks=2), 2)
    parts = [part + 1 for part in layout.parts(expected)]
    shards = evidence(expected, parts, layout.parts)["shards"]
    assert [(shard["ranks"], shard["rows"]) for shard in shards] == [
        ([2], [0, 2]), ([2], [4, 6]), ([3], [2, 4]), ([3], [6, 8]),
    ]  # fmt: skip


def test_of_replicas_the_worst_one_is_shown() -> None:
    expected = torch.ones(4)
    worse = expected.clone()
    worse[3] = inf
    layout = Layout.replicated((4,), 2)
    found = evidence(expected, (expected + 1, worse), layout.parts, is_replicated=True)
    assert found["tiles"] == [[0.0, 0.0, 0.0, inf]]
    assert found["shards"] == [{"ranks": [2, 3], "rows": [0, 1], "columns": [0, 4]}]


def test_beside_an_infinity_that_both_sides_have_errors_are_absolute() -> None:
    expected = torch.tensor([inf, 1.0])
    actual = torch.tensor([inf, 3.0])
    found = evidence(expected, (actual, expected), Layout.replicated((2,), 2).parts, is_replicated=True)
    assert found["tiles"] == [[0.0, 2.0]]


def test_padding_of_a_shard_is_in_no_tile() -> None:
    positions = (torch.tensor([0, 1]), torch.tensor([2]))
    layout = Layout.from_positions((3,), positions)
    padded = Layout((3,), ((2,), (2,)), layout.source)
    found = evidence(torch.ones(3), (torch.ones(2), torch.tensor([1.0, 9.0])), padded.parts)
    assert found["tiles"] == [[0.0, 0.0, 0.0]]
    assert found["shards"][1] == {"ranks": [3], "rows": [0, 1], "columns": [2, 3]}


def test_scattered_parts_have_no_borders() -> None:
    layout = Layout.from_positions((2, 2), (torch.tensor([0, 3]), torch.tensor([1, 2])))
    assert evidence(torch.ones(2, 2), (torch.zeros(2), torch.ones(2)), layout.parts)["shards"] == []


@pytest.mark.parametrize(
    ("expected", "parts", "cut"),
    [
        (torch.ones(4), (torch.ones(3), torch.ones(3)), Layout.replicated((4,), 2).parts),  # of another shape
        (torch.tensor(1.0), (torch.tensor(2.0),) * 2, Layout.replicated((), 2).parts),  # a number
        (torch.ones(2, dtype=torch.complex64), (torch.ones(2),) * 2, Layout.replicated((2,), 2).parts),
        (torch.ones(0), (torch.ones(0),) * 2, Layout.replicated((0,), 2).parts),
        (torch.ones(2), (torch.ones(2),) * 2, None),
        (None, (), None),
    ],
)
def test_what_cannot_be_subtracted_has_no_map(expected: Any, parts: Any, cut: Any) -> None:
    assert error_map(suspect(expected, parts, cut)) is None
