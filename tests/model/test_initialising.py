"""Models that are made from scratch under each backend, in one world: right ones pass, others say why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tpcheck import Topology
from tpcheck.backends.registry import load_backend
from tpcheck.families.build import small_model
from tpcheck.model.options import Request, RunOptions
from tpcheck.model.verify import run
from tpcheck.numerics.checks import INITIALISATION_CHECK
from tpcheck.world.world import World, spawn

ONE_LAYER = {"num_hidden_layers": 1, "vocab_size": 32}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with spawn(Topology(tp=2), timeout=120) as world:
        yield world


BUILD = partial(small_model, "llama", ONE_LAYER)


def verified(world: World, backend: Any, build: Any = BUILD, **options: Any) -> tpcheck.Report:
    options = {"topology": Topology(tp=2), "backend": backend, "checks": (INITIALISATION_CHECK,), **options}
    return run(Request(build, RunOptions.of(**options)), {"model": "built"}, again=None, world=world)


@pytest.mark.parametrize("backend", ["deepspeed", "transformers", "dtensor"])
def test_right_initialisation_passes_and_is_all_that_was_compared(backend: str, world: World) -> None:
    report = verified(world, backend)
    assert report.passed, report
    coverage = report.verdict.coverage
    assert coverage.compared == coverage.total > 30


class Unresettable(nn.Module):
    """Has a parameter of its own, and nothing that draws it again."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16))
        self.up = nn.Linear(16, 8)


def test_a_model_that_cannot_be_initialised_on_the_meta_device_is_compared_in_the_other_way(world: World) -> None:
    report = verified(world, "dtensor", Unresettable, config={"plan": {"up": "colwise"}})
    assert report.passed, report
    (reason,) = [why for name, why in report.verdict.coverage.not_compared.items() if "meta device" in name]
    assert "has parameters and no reset_parameters" in reason


class WithoutAWay:
    """A backend of a third party, without a way to make models from scratch."""

    name = "third"

    def __init__(self) -> None:
        self._backend = load_backend("dtensor")

    def versions(self) -> Mapping[str, str]:
        return {}

    def resolved(self, options: Any) -> Any:
        return options

    def session(self, options: Any) -> Any:
        return self._backend.session(options)

    def shard(self, model: nn.Module, rank: Any, options: Any) -> Any:
        return self._backend.shard(model, rank, options)


def test_a_backend_without_a_way_of_its_own_has_not_passed(world: World) -> None:
    report = verified(world, WithoutAWay())
    assert report.verdict.verdict == "skipped"
    assert "the backend third offers no way to make a model from scratch" in str(report.verdict.message)
