"""Runs whose ranks hold slices of sequences (cp): right ones pass beside one process, faults are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcheck
from tests.runs.context_model import Setting, places, train
from tpcheck import Rank, Report, Topology, UsageError, World
from tpcheck.numerics.sketch import keys_of_sums, row_keys, sample_keys, slice_sums
from tpcheck.runs.comparing.alignment import Run
from tpcheck.runs.recording.slices import ContextGroup, digests_of_pieces, positions_among
from tpcheck.runs.trace.files import read_trace

ZIGZAG, STRIPED = Setting(order="zigzag"), Setting(order="striped")
CP2, CP4, DP2, TP2 = Topology(cp=2), Topology(cp=4), Topology(dp=2, cp=2), Topology(tp=2, cp=2)
REPLICAS = Topology(tp=2, dp=2)
Compare = Callable[[Topology, Setting], Report]


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, World]]:
    """Worlds by size, whose ranks train at any topology of it."""
    with tpcheck.spawn(CP2, timeout=120) as two, tpcheck.spawn(TP2, timeout=120) as four:
        yield {2: two, 4: four}


@pytest.fixture(scope="module")
def compare(worlds: dict[int, World], tmp_path_factory: pytest.TempPathFactory) -> Compare:
    """Train on ranks, and compare with one process that trains alike without slices and without the fault."""
    folder = tmp_path_factory.mktemp("slices")
    expected: dict[Setting, str] = {}

    def run(topology: Topology, setting: Setting) -> Report:
        alike = replace(setting, fault="", order="contiguous", adds=True, calls=1, steps=2, replays=2)
        if alike not in expected:
            expected[alike] = str(folder / f"one-{len(expected)}.trace")
            train(Topology(), None, expected[alike], alike)
        path = str(folder / f"cp-{topology.sizes}-{setting.order}.trace")
        worlds[topology.world_size].run(train_on, topology, path, setting)
        return tpcheck.compare_traces(path, expected[alike])

    return run


def train_on(rank: Rank, topology: Topology, path: str, setting: Setting) -> None:
    train(topology, rank, path, setting)


def place_of(report: Report) -> tuple[Any, ...]:
    finding = report.findings[0]
    where = finding.where
    return where.get("parameter") or where.get("module") or where["field"], finding.cause, where["ranks"]


@pytest.mark.parametrize(
    ("topology", "setting"),
    [
        (CP2, Setting()),
        (CP2, replace(ZIGZAG, adds=True, padded=True, positions=False)),
        (CP2, replace(ZIGZAG, positions=False, rotary=True, returns_loss=True)),
        (CP2, replace(STRIPED, dtype=torch.bfloat16)),
        (CP4, replace(ZIGZAG, padded=True, adds=True)),
        (DP2, replace(ZIGZAG, adds=True)),
        (TP2, Setting(replays=2)),
        (TP2, replace(ZIGZAG, calls=2)),
        (REPLICAS, Setting(adds=True)),  # terms that are summed outside their module, of replicas that add up, too
    ],
)
def test_a_right_run_passes_beside_one_process(compare: Compare, topology: Topology, setting: Setting) -> None:
    report = compare(topology, setting)
    assert report.passed, report.to_text()
    checks = {check.check: check.compared for check in report.verdict.checks}
    assert checks["outputs_match_reference"] >= 24 * setting.steps
    assert checks["gradients_match_reference"] >= 48 * setting.steps
    assert not any("gradient of" in name or "output of" in name for name in report.verdict.coverage.not_compared)
    subject = report.verdict.subject
    kind = "positions" if setting.order == "striped" else setting.order
    assert topology.cp == 1 or (subject["cp"], subject["slices"]) == (topology.cp, kind)


def test_runs_with_other_numbers_of_slices_are_compared(compare: Compare, tmp_path: Path) -> None:
    folder = compare(TP2, Setting(steps=1)).verdict.subject["subject"]
    other = compare(CP4, replace(ZIGZAG, steps=1)).verdict.subject["subject"]
    report = tpcheck.compare_traces(folder, other)
    assert not report.findings, report.to_text()
    assert report.verdict.verdict == "skipped"  # neither has replays
    ranks = read_trace(other)
    with pytest.raises(UsageError, match=r"of all slices \(cp\)"):
        Run.of(other, ranks[:3])


_FIRST, _OTHER = "slice_taken_for_first", "positions_of_another_order"
WRONG = [
    (CP2, Setting(fault="not reduced"), "layers.0.norm1.weight", "missing_reduce", [0, 1]),
    (CP2, replace(ZIGZAG, fault="nothing reduced", adds=True), "tokens.weight", "missing_reduce", [0, 1]),
    (CP2, Setting(fault="mean of terms", adds=True), "tokens.weight", "mean_instead_of_sum", [0, 1]),
    (CP2, Setting(fault="positions from 0"), "places", _FIRST, [1]),
    (CP2, replace(ZIGZAG, fault="positions from 0", rotary=True), "layers.0.attention.o", _FIRST, [0, 1]),
    (CP2, replace(ZIGZAG, fault="positions in another order"), "places", _OTHER, [0, 1]),
    (CP2, Setting(fault="mask of the first slice"), "layers.0.attention.o", _FIRST, [1]),
    (CP2, Setting(fault="keys not gathered"), "layers.0.attention.o", _FIRST, [1]),
    (CP2, Setting(fault="local number of labels", padded=True), "head", "mean_of_local_means", [0, 1]),
    (CP4, replace(ZIGZAG, fault="slice of another sample"), "slices of samples", "slice_of_another_sample", [1]),
    (DP2, Setting(fault="not reduced over cp"), "layers.0.norm1.weight", "missing_reduce", [0, 1, 2, 3]),
    (TP2, Setting(fault="mask of the first slice"), "layers.0.attention.o", _FIRST, [0, 1, 2, 3]),
    (REPLICAS, Setting(fault="not reduced", adds=True), "layers.0.norm1.weight", "missing_reduce", [0, 1, 2, 3]),
    (REPLICAS, Setting(fault="mean of terms", adds=True), "head", "gradient_scaled", [0, 1, 2, 3]),  # or of the loss
]


@pytest.mark.parametrize(("topology", "setting", "place", "cause", "ranks"), WRONG)
def test_a_fault_of_slices_is_found_placed_and_named(
    compare: Compare, topology: Topology, setting: Setting, place: str, cause: str, ranks: list[int]
) -> None:
    report = compare(topology, replace(setting, steps=1))
    assert place_of(report) == (place, cause, ranks), report
    if cause == "missing_reduce":
        assert report.findings[0].evidence["reduced_over"] == ("cp" if topology.cp > 1 else "dp")


def test_slices_in_an_order_that_nothing_tells_are_not_compared(compare: Compare) -> None:
    report = compare(CP2, replace(STRIPED, positions=False, steps=1))
    assert report.verdict.verdict == "skipped"
    assert "neither contiguous nor zigzag" in str(report.verdict.coverage.not_compared["step 0"])


# ---- parts


def test_sums_over_slices_make_the_digests_and_the_rows_of_whole_samples() -> None:
    whole = torch.randn(3, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for setting in (Setting(), ZIGZAG):
        held = [places(setting, 2, rank) // 4 for rank in range(2)]
        held = [positions.unique_consecutive() for positions in held]
        parts = [slice_sums(whole[:, positions], positions) for positions in held]
        digests = keys_of_sums(parts[0][0] + parts[1][0], 8 * parts[0][1])
        assert torch.equal(digests, sample_keys(whole))
        rows = row_keys(digests, 8)
        for positions in held:
            own = row_keys(digests, 8, positions)
            assert torch.equal(own.keys, rows.keys.reshape(3, 8)[:, positions].reshape(-1))
            assert torch.equal(own.tiles, rows.tiles.reshape(3, 8)[:, positions].reshape(-1))
    pieces = digests_of_pieces(whole, 1)
    assert pieces is not None
    assert torch.equal(digests_of_pieces(whole[:, 4:], 2), pieces[:, 4:])  # type: ignore[arg-type]


def test_positions_are_found_by_the_name_of_their_argument() -> None:
    class Model(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> None: ...

    tokens, positions = torch.zeros(2, 4, dtype=torch.int64), torch.arange(4)
    given = [("0", tokens), ("1", positions)]
    found = positions_among(Model(), given, tokens)
    assert found is not None
    assert torch.equal(found, positions)
    assert positions_among(Model(), [("0", tokens), ("mask", positions)], tokens) is None
    assert positions_among(Model(), [("0", tokens), ("position_ids", positions.double())], tokens) is None


GIVEN = {
    "contiguous": ([[0, 1, 2, 3], [4, 5, 6, 7]], 2),
    "zigzag": ([[0, 1, 6, 7], [2, 3, 4, 5]], 2),
    "positions": ([[0, 2, 4, 6], [1, 3, 5, 7]], 3),
    "from 0 on each rank": ([[0, 1, 2, 3], [0, 1, 2, 3]], 2),
    "": ([[0, 1, 2, 3], [3, 4, 5, 6]], 2),
}


def orders_of(rank: Rank) -> list[tuple[str, int]]:
    """Return for each case what the positions follow, and the number of orders; last one of unequal slices."""
    group = ContextGroup(range(2), rank.rank)
    tokens = torch.ones(1, 4, dtype=torch.int64)
    calls = [group.slices(tokens, torch.tensor(positions[rank.rank])) for positions, _ in GIVEN.values()]
    calls += [group.slices(tokens, None), group.slices(tokens[:, rank.rank :], None), group.slices(None, None)]
    return [(call.positions, len(call.slices)) for call in calls]


def test_the_orders_that_slices_may_be_in(worlds: dict[int, World]) -> None:
    first, second = worlds[2].run(orders_of)
    assert first == second
    assert first == [*((name, number) for name, (_, number) in GIVEN.items()), ("", 2), ("", 0), ("", 0)]
