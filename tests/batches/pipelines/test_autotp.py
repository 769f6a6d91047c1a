"""Random crops under DeepSpeed's AutoTP, drawn on each rank by itself: DeepSpeed checks only the first batch."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tpcheck
from tpcheck import Rank, Topology, World

# C channels, H height, W width; suffixes name the dims
CROP, STEPS = 6, 5
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 0},
    "steps_per_print": 1_000_000,
    "tensor_parallel": {
        "autotp_size": 2,
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [
                {"patterns": [".*up\\.weight$"], "partition_type": "column"},
                {"patterns": [".*down\\.weight$"], "partition_type": "row"},
            ],
        },
    },
}


class Crops(Dataset[Any]):
    """Pictures, cropped at random where they are larger than the crop: the first two are not."""

    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        size = CROP if index < 2 else 2 * CROP
        image_CHW = torch.arange(3.0 * size * size).reshape(3, size, size) / size**2 + index
        top, left = random.randint(0, size - CROP), random.randint(0, size - CROP)
        return {"pixel_values": image_CHW[:, top : top + CROP, left : left + CROP], "labels": torch.tensor(index % 2)}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3 * CROP * CROP, 16)
        self.down = nn.Linear(16, 2)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.down(torch.relu(self.up(pixel_values.flatten(1)))), labels)


def train(rank: Rank, *, watched: bool, advised: bool = False) -> dict[str, Any]:
    """Train as a user does; `advised` seeds the generator as the finding says."""
    import deepspeed

    torch.manual_seed(0)
    engine, *_ = deepspeed.initialize(model=(model := Classifier()), model_parameters=model.parameters(), config=CONFIG)
    if advised:
        random.seed(1 + rank.dp_rank)
    loader: Any = DataLoader(Crops(), batch_size=2)
    if watched:
        loader = tpcheck.watch(loader, timeout=20)  # DeepSpeed's groups are found
    result: dict[str, Any] = {"sums": [], "finding": None, "message": ""}
    try:
        for batch in loader:
            engine.backward(engine(**batch))
            engine.step()
            result["sums"].append(float(batch["pixel_values"].sum()))
    except tpcheck.BatchMismatch as mismatch:
        result["finding"], result["message"] = mismatch.report.findings[0], str(mismatch)
    result["source"] = loader.watcher.source if watched else ""
    return result


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tpcheck.spawn(Topology(tp=2), timeout=120) as world:
        yield world


def test_deepspeed_checks_the_first_batch_alone(world: World) -> None:
    actual, expected = (result["sums"] for result in world.run(train, watched=False))
    assert len(actual) == STEPS
    assert actual[0] == expected[0]
    assert actual[1:] != expected[1:]


def test_a_watched_loader_stops_at_the_first_wrong_step_with_its_cause(world: World) -> None:
    for result in world.run(train, watched=True):
        finding = result["finding"]
        assert len(result["sums"]) == 1
        assert finding.check == "batches_agree_within_tp"
        assert (finding.where["step"], finding.where["field"]) == (1, "pixel_values")
        assert finding.where["index"][0] in (0, 1)  # the sample
        assert (finding.cause, finding.evidence["where"]) == ("rng_differs_python", "the main process")
        assert finding.evidence["advice"].startswith("Call `random.seed(seed + dp_rank)` on every rank")
        assert finding.evidence["advice"].endswith("Here dp_rank is deepspeed.utils.groups.get_data_parallel_rank().")
        assert "rng_differs_python" in result["message"]
        assert result["source"].endswith("from deepspeed.utils.groups")


def warn_of_the_first_batch(rank: Rank, removes_check: bool) -> tuple[list[str], str, int]:
    """Train with labels that differ from the first batch on; return warnings, what DeepSpeed raises, and the steps."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=(model := Classifier()), model_parameters=model.parameters(), config=CONFIG)
    if removes_check:
        engine.first_dataloader_check.remove()
    images, steps, raised = torch.ones(2, 3, CROP, CROP), 0, ""
    batches = [{"pixel_values": images * step, "labels": torch.full((2,), rank.tp_rank)} for step in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for batch in tpcheck.watch(batches, timeout=20, on_mismatch="warn"):
                engine.backward(engine(**batch))
                engine.step()
                steps += 1
        except AssertionError as error:
            raised = str(error)
    return [str(each.message) for each in caught if "batches_agree_within_tp" in str(each.message)], raised, steps


@pytest.mark.parametrize("removes_check", [False, True])
def test_a_warning_says_that_deepspeed_ends_the_run_itself_and_how_to_go_on(world: World, removes_check: bool) -> None:
    (warned, raised, steps), (warned_elsewhere, *_) = world.run(warn_of_the_first_batch, removes_check)
    assert "call engine.first_dataloader_check.remove() before the first forward pass" in " ".join(warned[0].split())
    assert warned_elsewhere[0].count("\n") == 0
    if removes_check:
        assert (steps, raised) == (3, "")
    else:
        assert (steps, raised[:41]) == (0, "Data inconsistency within the TP group. P")


def test_after_the_advised_change_the_batches_are_equal(world: World) -> None:
    actual, expected = world.run(train, watched=True, advised=True)
    assert actual["finding"] is None
    assert actual["sums"] == expected["sums"]
    assert len(actual["sums"]) == STEPS
