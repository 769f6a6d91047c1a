"""Where shapes leave several readings of an output, one is kept once digests or the module's weight have decided."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, product

import pytest
import torch
from torch import nn

from tpcheck.core.placement import Shard
from tpcheck.numerics.optimizer_view import Part
from tpcheck.numerics.sketch import GlobalIndex, start_sketch
from tpcheck.runs.recording.activations import ActivationPlaces, BatchShape
from tpcheck.runs.recording.output_places import Output, OutputPlaces, is_uniform

TOKENS = torch.arange(12).reshape(3, 4)
HIDDEN = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KEY = ("norm", "", 0)


def places(tensor: torch.Tensor = HIDDEN, known: GlobalIndex | None = None) -> list[str]:
    found = ActivationPlaces(BatchShape.of([TOKENS]), 2, 0).places(tensor, known=known)
    return [place.label for place in found]


def after(*steps: tuple[Output, Output]) -> OutputPlaces:
    """Return what is decided after steps in which two ranks said this of one output."""
    decided = OutputPlaces({}, (0,), 0, "run")
    for number, of_ranks in enumerate(steps):
        decided.post(number, {KEY: of_ranks[0]})
        decided.decide([{KEY: said} for said in of_ranks])
    return decided


def kept(decided: OutputPlaces) -> list[str]:
    found = ActivationPlaces(BatchShape.of([TOKENS]), 2, 0).places(HIDDEN)
    return [place.label for place in decided.kept(KEY, found)]


SAME = (Output("a", False), Output("a", False))
OTHER = (Output("a", False), Output("b", False))
UNIFORM = (Output("a", True), Output("a", True))


def test_what_all_ranks_have_to_the_bit_is_a_replica() -> None:
    assert kept(after(SAME)) == ["whole"]


@pytest.mark.parametrize("said", [OTHER, UNIFORM], ids=["other bits", "shards may be equal, too"])
def test_shards_and_terms_keep_all_readings(said: tuple[Output, Output]) -> None:
    assert kept(after(said)) == ["whole", "dim -1"]


def test_what_was_uniform_is_decided_once_it_is_not() -> None:
    assert kept(after(UNIFORM, SAME)) == ["whole"]
    assert kept(after(UNIFORM, OTHER)) == ["whole", "dim -1"]


def test_a_replica_that_is_none_any_more_is_said_and_has_both_readings_again() -> None:
    decided = after(SAME, SAME, OTHER, SAME)
    assert kept(decided) == ["whole", "dim -1"]
    [(label, reason)] = decided.changed().items()
    assert label == "output of norm"
    assert "others in step 2" in reason
    assert after(SAME).changed() == {}


def test_shards_may_be_equal_where_nothing_changes_along_a_cut() -> None:
    finder = ActivationPlaces(BatchShape.of([TOKENS]), 2, 0)
    assert not is_uniform(HIDDEN, finder.places(HIDDEN))
    assert is_uniform(HIDDEN[..., :1].expand(3, 4, 6), finder.places(HIDDEN))
    one_head = HIDDEN[:, :, None]  # of each rank: shards of the heads are equal if the heads are
    assert is_uniform(one_head, finder.places(one_head))


@pytest.mark.parametrize(
    ("dim", "weight", "given", "labels"),
    [(0, (6, 8), 8, ["layout"]), (1, (6, 4), 4, ["whole"]), (0, (6, 8), 6, ["whole", "dim -1"])],
    ids=["column-parallel", "row-parallel", "it is not given what its weight takes"],
)
def test_the_output_of_a_linear_module_lies_as_its_weight(
    dim: int, weight: tuple[int, int], given: int, labels: list[str]
) -> None:
    module = nn.Linear(weight[1], weight[0], bias=False).double()
    whole = (12, 8) if dim == 0 else (6, 8)
    index = GlobalIndex.shard(whole, Shard(dim), 2, 1)
    part = Part("weight", "up.weight", "", module.weight.detach(), index)
    decided = OutputPlaces({"up.weight": part}, (0, 1), 1, "run")
    columns = decided.columns(module, "up", (torch.ones(3, 4, given),), HIDDEN)
    assert places(HIDDEN, columns) == labels
    if labels == ["layout"]:
        assert columns is not None
        assert columns.indices[0] is not None
        assert columns.indices[0].tolist() == [6, 7, 8, 9, 10, 11]


def test_a_square_weight_of_another_library_may_be_transposed_and_decides_nothing() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(6, 6))
    part = Part("weight", "up.weight", "", module.weight.detach(), GlobalIndex.shard((12, 6), Shard(0), 2, 0))
    decided = OutputPlaces({"up.weight": part}, (0, 1), 0, "run")
    assert decided.columns(module, "up", (HIDDEN,), HIDDEN) is None


def test_a_weight_that_its_module_holds_more_of_in_its_forward_pass_decides_nothing() -> None:
    module = nn.Linear(8, 6, bias=False).double()
    kept_rows = GlobalIndex.shard((12, 8), Shard(0), 4, 1)
    decided = OutputPlaces(
        {"up.weight": Part("weight", "up.weight", "", torch.ones(3, 8), kept_rows)}, (0, 1), 0, "run"
    )
    given = torch.ones(3, 4, 8, dtype=torch.float64)
    assert decided.columns(module, "up", (given,), HIDDEN) is None
    module.weight.data = torch.empty(0, dtype=torch.float64)  # as ZeRO 3 leaves it
    assert decided.columns(module, "up", (given,), HIDDEN) is None


def test_the_shape_that_zero_3_keeps_of_a_weight_decides() -> None:
    module = nn.Linear(8, 6, bias=False).double()
    module.weight.ds_shape = torch.Size((6, 8))
    module.weight.data = torch.empty(0, dtype=torch.float64)
    index = replace(GlobalIndex.shard((12, 8), Shard(0), 2, 1), fragment=(0, 24))
    decided = OutputPlaces({"up.weight": Part("weight", "up.weight", "", torch.ones(24), index)}, (0, 1), 1, "run")
    columns = decided.columns(module, "up", (torch.ones(3, 4, 8, dtype=torch.float64),), HIDDEN)
    assert columns is not None
    assert places(HIDDEN, columns) == ["layout"]


@pytest.mark.parametrize("known", [None, GlobalIndex.shard((8,), Shard(0), 2, 0)], ids=["unknown", "4 columns"])
def test_no_shape_is_an_error(known: GlobalIndex | None) -> None:
    sizes = (0, 3, 4, 6)  # none, the samples, the positions, the columns
    for shape in chain.from_iterable(product(sizes, repeat=dims) for dims in range(5)):
        tensor = torch.ones(shape)
        finder = ActivationPlaces(BatchShape.of([TOKENS]), 2, 0)
        found = finder.places(tensor, known=known)
        assert found
        is_uniform(tensor, found)
        for place in found:
            start_sketch(tensor, place.index, rows=place.rows)
