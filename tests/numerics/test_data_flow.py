"""What is computed from what, and who issues a collective in between."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from tests.numerics.evidence import key, right_evidence, with_step
from tpcheck.numerics.data_flow import DataFlow, consumers, is_exchanged_behind
from tpcheck.numerics.evidence import Collective, Evidence
from tpcheck.numerics.recorder import ModuleRecorder

# What autograd knows of the block in tests/numerics/evidence.py, with its residual connection.
SOURCES = {
    "block.norm input": ("block input",),
    "block.norm output": ("block.norm input",),
    "block.up input": ("block.norm output",),
    "block.up output": ("block.up input",),
    "block.down input": ("block.up output",),
    "block.down output": ("block.down input",),
    "block output": ("block.down output", "block input"),
}


def flowing(evidence: Evidence) -> Evidence:
    """Return the evidence with what is computed from what."""
    sources = {key(after): tuple(map(key, before)) for after, before in SOURCES.items()}
    return replace(evidence, reference=tuple(replace(step, sources=sources) for step in evidence.reference))


def behind(name: str, *collectives: Collective, phase: str = "forward", ranks: tuple[int, ...] = (0, 1)) -> bool:
    """Return whether ranks exchange something behind a tensor, which both do."""
    evidence = flowing(right_evidence())
    activations = list(evidence.reference[0].activations)
    issued = tuple(
        replace(each, phase=phase, position=activations.index(key(name, phase)) + each.position)  # type: ignore[arg-type]
        for each in collectives
    )
    return is_exchanged_behind(with_step(evidence, ranks=ranks, collectives=issued), 0, key(name, phase))


def reduced(module: str, after: int = 1) -> Collective:
    return Collective(module, "all_reduce", (0, 1), position=after)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.outer(self.inner(hidden).relu())


def test_a_recorder_sees_what_is_computed_from_what_also_between_modules() -> None:
    flow, model = DataFlow(), Residual()
    with ModuleRecorder(model, lambda key, tensor: None, flow=flow):
        model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    named = {str(after): sorted(map(str, before)) for after, before in flow.sources.items()}
    assert named == {
        "model: input 0": [],
        "inner: input 0": ["model: input 0"],
        "inner: output 0": ["inner: input 0"],
        "outer: input 0": ["inner: output 0"],
        "outer: output 0": ["outer: input 0"],
        "model: output 0": ["model: input 0", "outer: output 0"],
    }


class Shifted(nn.Module):
    """Has a parameter of its own beside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.inner = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden + self.shift) * self.shift


def test_a_recorder_sees_what_is_computed_from_each_parameter() -> None:
    flow, model = DataFlow(), Shifted()
    with ModuleRecorder(model, lambda key, tensor: None, flow=flow):
        model(torch.ones(1, 2))
    uses = {name: list(map(str, flow.uses[parameter])) for name, parameter in model.named_parameters()}
    assert uses == {
        "shift": ["inner: input 0", "model: output 0"],
        "inner.weight": ["inner: output 0"],
        "inner.bias": ["inner: output 0"],
    }


def test_without_gradients_nothing_is_known() -> None:
    flow, model = DataFlow(), Residual()
    with torch.no_grad(), ModuleRecorder(model, lambda key, tensor: None, flow=flow):
        model(torch.ones(1, 2))
    assert not flow.sources


def test_gradients_flow_to_where_the_tensor_came_from() -> None:
    evidence = flowing(right_evidence())
    assert consumers(evidence, 0, key("block input")) == (key("block.norm input"), key("block output"))
    assert consumers(evidence, 0, key("block.up input", "backward")) == (key("block.norm output", "backward"),)
    assert consumers(evidence, 0, key("block input", "backward")) == ()


def test_a_reduction_in_the_parents_forward_stands_behind_the_module() -> None:
    assert behind("block.down output", reduced("block"))
    assert behind("block.up input", reduced(""), phase="backward")


def test_reductions_of_other_modules_and_of_the_module_itself_do_not() -> None:
    assert not behind("block.down output", reduced("block.up"))
    assert not behind("block.down output", reduced("block.down", after=0))
    assert not behind("block.down output")


def test_every_rank_must_issue_it() -> None:
    assert not behind("block.down output", reduced("block"), ranks=(0,))


def test_it_is_unknown_without_sources() -> None:
    evidence = with_step(right_evidence(), collectives=(Collective("block", "all_reduce", (0, 1), position=7),))
    assert not is_exchanged_behind(evidence, 0, key("block.down output"))
