"""A hook on a model, in any loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tpcheck import Rank, Topology, UsageError, World, spawn
from tpcheck.lab.faults.pipelines import augmented


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with spawn(Topology(tp=2), timeout=60) as world:
        yield world


class Brightness(nn.Module):
    """A model whose batch comes partly by position and partly by name."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor, **more: Any) -> torch.Tensor:
        return (pixel_values.mean() * self.scale - labels.float().mean()).square()


class Engine(nn.Module):
    """A wrapper with the attribute that engines and DistributedDataParallel have."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


def loop(rank: Rank, *, wrapped: bool = False, with_loader: bool = True, labels_off: int = 0) -> Any:
    """Train on images whose brightness is drawn on each rank; return the finding and the number of steps."""
    model: nn.Module = Brightness()
    called = Engine(model) if wrapped else model
    loader = augmented(rank, "python", seeded=bool(labels_off))
    watched = tpcheck.watch_model(called, loader=loader if with_loader else None, topology=rank.topology, timeout=20)
    steps = 0
    try:
        for batch in loader:
            called(batch["pixel_values"], labels=batch["labels"] + labels_off * rank.tp_rank, note=None).backward()
            steps += 1
    except tpcheck.BatchMismatch as mismatch:
        return mismatch.report.findings[0], steps
    finally:
        watched.remove()
    return None, steps


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_first_wrong_step_is_found_with_its_cause(pair: World, wrapped: bool) -> None:
    for finding, steps in pair.run(loop, wrapped=wrapped):
        assert (finding.where["field"], finding.where["step"], steps) == ("pixel_values", 2, 2)
        assert (finding.cause, finding.evidence["where"]) == ("rng_differs_python", "the main process")


def test_without_its_loader_a_difference_is_found_without_a_cause(pair: World) -> None:
    finding, steps = pair.run(loop, with_loader=False)[0]
    assert (finding.where["field"], finding.cause, steps) == ("pixel_values", None, 2)


def test_labels_are_compared(pair: World) -> None:
    finding, steps = pair.run(loop, labels_off=1)[0]
    assert (finding.where["field"], finding.cause, steps) == ("labels", None, 0)


def evaluate(rank: Rank) -> bool:
    """Give every rank another batch in evaluation and after removal; return whether the hook is removed."""
    model = Brightness()
    images, labels = torch.full((2, 3), float(rank.rank)), torch.zeros(2)
    with tpcheck.watch_model(model, topology=rank.topology, timeout=20):
        with torch.no_grad():
            model(images, labels)
        model.eval()
        model(images, labels)
        model.train()
    model(images, labels)
    return not model._forward_pre_hooks


def test_evaluation_is_not_compared_and_the_hook_is_removed(pair: World) -> None:
    assert pair.run(evaluate) == (True, True)


def test_hooks_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCHECK", "0")
    model = Brightness()
    tpcheck.watch_model(model).remove()
    assert not model._forward_pre_hooks


def test_anything_but_a_model_raises() -> None:
    with pytest.raises(UsageError, match=r"engine_or_model='list': expected a torch.nn.Module"):
        tpcheck.watch_model([])  # type: ignore[arg-type]


def test_it_needs_no_transformers() -> None:
    program = "import sys; sys.modules['transformers'] = None; from tpcheck import watch_model"
    subprocess.run([sys.executable, "-c", program], check=True)
