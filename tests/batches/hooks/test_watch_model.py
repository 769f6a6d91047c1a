"""A hook on a model, in any loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tpcheck import Rank, Topology, UsageError
from tpcheck.lab.faults.pipelines import augmented


class Brightness(nn.Module):
    """A model whose batch comes partly by position and partly by name."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor, **more: Any) -> torch.Tensor:
        return (pixel_values.mean() * self.scale - labels.float().mean()).square()


class Engine(nn.Module):
    """What engines and wrappers look like from outside."""

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
def test_the_first_bad_step_is_told_with_its_cause(wrapped: bool) -> None:
    with tpcheck.spawn(Topology(tp=2)) as world:
        for finding, steps in world.run(loop, wrapped=wrapped):
            assert (finding.where["field"], finding.where["step"], steps) == ("pixel_values", 2, 2)
            assert (finding.cause, finding.evidence["where"]) == ("rng_differs_python", "the main process")


def test_without_its_loader_a_batch_is_found_and_not_explained() -> None:
    with tpcheck.spawn(Topology(tp=2)) as world:
        finding, steps = world.run(loop, with_loader=False)[0]
        assert (finding.where["field"], finding.cause, steps) == ("pixel_values", None, 2)


def test_labels_are_compared_too() -> None:
    with tpcheck.spawn(Topology(tp=2)) as world:
        finding, steps = world.run(loop, labels_off=1)[0]
        assert (finding.where["field"], finding.cause, steps) == ("labels", None, 0)


def evaluated(rank: Rank) -> bool:
    """Give every rank another batch where no gradient is asked for, and take the hook away."""
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


def test_evaluation_is_not_looked_at_and_nothing_stays_behind() -> None:
    with tpcheck.spawn(Topology(tp=2)) as world:
        assert world.run(evaluated) == (True, True)


def test_hooks_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCHECK", "0")
    model = Brightness()
    tpcheck.watch_model(model).remove()
    assert not model._forward_pre_hooks


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match=r"engine_or_model='list': expected a torch.nn.Module"):
        tpcheck.watch_model([])  # type: ignore[arg-type]
