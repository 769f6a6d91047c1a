"""Weights that two runs have drawn for themselves, and what looks like it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from tests.runs.hand_made import WEIGHTS, Place, initial_weights, run
from tpcheck.core.causes import Cause
from tpcheck.report.report import Report
from tpcheck.runs.comparing.alignment import Run
from tpcheck.runs.comparing.compare import compare_runs

Weights = Mapping[str, torch.Tensor]
RIGHT = initial_weights()
UP, HEAD, EMBED = "layers.0.up.weight", "head.weight", "embed.weight"


def starting_from(weights: Weights) -> Report:
    """Compare a run at tp 2 that starts from other weights with the right one at tp 1."""

    def edit(place: Place, local: torch.Tensor) -> torch.Tensor:
        if place.kind != "weight" or place.step >= 0:
            return local
        dim = WEIGHTS[place.name]
        whole = weights.get(place.name, place.whole)
        return whole if dim is None else whole.chunk(2, dim)[place.tp_rank]

    return compare_runs(Run.of("actual", run(tp=2, edit=edit)), Run.of("expected", run(rounding=1.0, seed=5)))


def drawn(seed: int, **scales: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scales.get(name.rpartition(".")[0].replace(".", "_"), 1.0)
        * torch.randn(whole.shape, generator=generator, dtype=whole.dtype)
        for name, whole in RIGHT.items()
    }


def causes(report: Report) -> set[str | None]:
    assert not report.passed
    assert report.findings[0].check == "weights_match_reference"
    return {finding.cause for finding in report.findings if finding.check == "weights_match_reference"}


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_another_seed_are_drawn_separately(seed: int) -> None:
    report = starting_from(drawn(seed))
    assert causes(report) == {Cause.DRAWN_SEPARATELY.slug}
    assert "load one checkpoint" in report.to_text()


def test_one_weight_that_is_drawn_anew_is_enough() -> None:
    assert causes(starting_from({UP: drawn(3)[UP]})) == {Cause.DRAWN_SEPARATELY.slug}


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param({UP: RIGHT[UP].flip(1)}, id="columns in another order"),
        pytest.param({UP: RIGHT[HEAD], HEAD: RIGHT[UP]}, id="weights of other layers"),
        pytest.param({UP: RIGHT[UP] + 0.5 * drawn(1)[UP]}, id="partly the same"),
        pytest.param({UP: -RIGHT[UP]}, id="of the other sign"),
        pytest.param(drawn(1, layers_0_up=1.5), id="one is drawn from another distribution"),
        pytest.param({EMBED: drawn(1)[EMBED], UP: 2 * RIGHT[UP]}, id="another weight is wrong otherwise"),
    ],
)
def test_what_only_looks_drawn_separately_is_not(weights: Weights) -> None:
    assert Cause.DRAWN_SEPARATELY.slug not in causes(starting_from(weights))


def test_a_few_small_weights_show_nothing() -> None:
    norm = "layers.0.norm.weight"
    assert causes(starting_from({norm: drawn(2)[norm]})) == {None}
