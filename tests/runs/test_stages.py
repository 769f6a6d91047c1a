"""Pipeline stages by hand beside the whole model in one process: right ones pass, and faults are found.

A stage may be several ranks with slices of the samples' positions (cp).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tpcheck
from tpcheck import Rank, Topology, UsageError

WIDTH, SAMPLES, LENGTH, STEPS = 8, 4, 16, 2


class Model(nn.Module):
    """A model of four layers, or the ones of a stage, under the same names."""

    def __init__(self, layers: range = range(4)) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(4)]
        self.layers = nn.ModuleDict({str(number): whole[number] for number in layers})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            hidden = layer(hidden).tanh()
        return hidden


def samples(step: int) -> torch.Tensor:
    return torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def recording(model: nn.Module, path: str, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, tpcheck.record(model, path, optimizer=optimizer, **options)


def train_in_one_process(path: str) -> None:
    model = Model()
    optimizer, recorded = recording(model, path, topology=Topology(), replays=2)
    with recorded:
        for step in range(STEPS):
            model(samples(step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def train_stage(rank: Rank, path: str, fault: str) -> None:
    topology = rank.topology
    stage, cp_rank = topology.coordinate(rank.rank)["pp"], topology.coordinate(rank.rank).get("cp", 0)
    other = topology.peers(rank.rank, "pp")[1 - stage]
    group = [dist.new_group(ranks) for ranks in topology.groups("cp")][stage] if topology.cp > 1 else None
    model = Model(range(2) if stage == 0 else range(2, 4))
    if fault == "weight" and stage == 1:
        model.layers["3"].weight.data.mul_(1.5)
    optimizer, recorded = recording(model, path, topology=topology)
    buffer = torch.empty(SAMPLES, LENGTH // topology.cp, WIDTH, dtype=torch.float64)
    with recorded:
        for step in range(STEPS):
            if stage == 0:
                hidden = model(samples(step).chunk(topology.cp, 1)[cp_rank])
                dist.send(hidden.detach(), other)
                dist.recv(buffer, other)
                hidden.backward(2 * buffer if fault == "received gradient" else buffer)
            else:
                dist.recv(buffer, other)
                given = (0 * buffer if fault == "received" else buffer).clone().requires_grad_()
                model(given).square().sum().backward()
                dist.send(given.grad, other)
            for name, parameter in model.named_parameters():
                if group is not None and not (fault == "not reduced" and name == "layers.2.weight"):
                    dist.all_reduce(parameter.grad, group=group)
            if fault == "gradient" and stage == 1:
                model.layers["2"].weight.grad.mul_(2)
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("whole") / "one.trace")
    train_in_one_process(path)
    return path


@pytest.fixture(scope="module")
def world() -> Any:
    with tpcheck.spawn(Topology(pp=2), timeout=120) as world:
        yield world


def stages(world: Any, tmp_path: Path, fault: str = "") -> str:
    """Return the trace of two stages."""
    path = str(tmp_path / "stages.trace")
    world.run(train_stage, path, fault)
    return path


def test_the_stages_together_are_the_whole_model(world: Any, tmp_path: Path, expected: str) -> None:
    path = stages(world, tmp_path)
    report = tpcheck.compare_traces(path, expected)
    assert report.passed, report
    margins = {check.check: check.compared for check in report.verdict.checks}
    assert margins["weights_match_reference"] == 8
    assert margins["gradients_match_reference"] >= 8 * STEPS
    assert report.verdict.subject["pp"] == 2
    assert "outputs_match_reference" in margins
    assert any("a later pipeline stage has it" in why for why in report.verdict.coverage.not_compared.values())
    assert tpcheck.compare_traces(expected, path).passed
    with pytest.raises(UsageError, match="a stage with a parameter of"):
        tpcheck.compare_traces(path, expected, names={"^layers": "blocks"})


@pytest.mark.parametrize(
    ("fault", "check", "place"),
    [
        ("weight", "weights_match_reference", "layers.3.weight"),
        ("gradient", "gradients_match_reference", "layers.2.weight"),
        ("received", "gradients_match_reference", "layers.2.weight"),  # the first layer of the stage, whose input it is
        ("received gradient", "gradients_match_reference", "layers.1"),  # the last layer of the stage
    ],
)
def test_a_fault_is_found_in_its_stage(
    world: Any, tmp_path: Path, expected: str, fault: str, check: str, place: str
) -> None:
    finding = tpcheck.compare_traces(stages(world, tmp_path, fault), expected).findings[0]
    assert (finding.check, finding.where.get("parameter") or finding.where["module"]) == (check, place)


def test_stages_with_slices_of_samples_are_the_whole_model(tmp_path: Path, expected: str) -> None:
    with tpcheck.spawn(Topology(pp=2, cp=2), timeout=120) as world:
        report = tpcheck.compare_traces(stages(world, tmp_path), expected)
        assert report.passed, report.to_text()
        assert {check.check: check.compared for check in report.verdict.checks}["outputs_match_reference"] == 2 * STEPS
        finding = tpcheck.compare_traces(stages(world, tmp_path, "not reduced"), expected).findings[0]
    where = finding.where
    assert (where["parameter"], where["ranks"], finding.cause) == ("layers.2.weight", [2, 3], "missing_reduce")
    assert finding.evidence["reduced_over"] == "cp"
