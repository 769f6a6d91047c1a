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


def flowing(evidence: Evidence, *, nonlinear: str = "") -> Evidence:
    """Return the evidence with what is computed from what, all of it linear but for one tensor."""
    sources = {key(after): tuple(map(key, before)) for after, before in SOURCES.items()}
    linear = {key(after): tuple(map(key, before)) for after, before in SOURCES.items() if after != nonlinear}
    steps = (replace(step, sources=sources, linear=linear) for step in evidence.reference)
    return replace(evidence, reference=tuple(steps))


def behind(
    name: str,
    *collectives: Collective,
    phase: str = "forward",
    ranks: tuple[int, ...] = (0, 1),
    nonlinear: str = "",
) -> bool:
    """Return whether ranks exchange something behind a tensor, which both do."""
    evidence = flowing(right_evidence(), nonlinear=nonlinear)
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


class Adapted(nn.Module):
    """A layer with an adapter, and with a magnitude as DoRA has it, and an activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.low, self.high, self.act = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 4), nn.SiLU()
        self.magnitude = nn.Parameter(torch.ones(4))

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        base_BLD = self.base(hidden_BLD)
        scale_D = self.magnitude / self.base.weight.norm(dim=1).detach()
        adapted_BLD = base_BLD + (scale_D - 1) * base_BLD + scale_D * self.high(self.low(hidden_BLD))
        return self.act(adapted_BLD) * base_BLD


def test_a_recorder_sees_in_what_a_tensor_is_linear() -> None:
    flow, model = DataFlow(), Adapted()
    with ModuleRecorder(model, lambda key, tensor: None, flow=flow):
        model(torch.ones(1, 3, 4, requires_grad=True))
    linear = {str(after): sorted(map(str, before)) for after, before in flow.linear.items()}
    assert linear["act: input 0"] == ["base: output 0", "high: output 0"]
    assert linear["act: output 0"] == []
    assert linear["model: output 0"] == ["act: output 0", "base: output 0"]
    layers = ("base", "low", "high")
    assert all(linear[f"{layer}: output 0"] == [f"{layer}: input 0"] for layer in layers)


def test_a_product_of_a_tensor_with_itself_is_not_linear_in_it() -> None:
    flow, leaf = DataFlow(), torch.ones(2, requires_grad=True)
    x = leaf * 1
    tensors = {"x": x, "square": x * x, "inverse": 1 / x, "half": x / 2, "difference": x - x.exp()}
    for name, tensor in tensors.items():
        flow.add(name, tensor)
    assert {name for name, sources in flow.linear.items() if "x" in sources} == {"half"}


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


def test_terms_stay_terms_through_what_is_linear_with_whole_weights() -> None:
    assert behind("block.norm input", reduced("block", after=2))
    assert not behind("block.norm input", reduced("block", after=2), nonlinear="block.norm output")
    assert not behind("block.down input", reduced("", after=2))  # its weight is cut


def test_every_rank_must_issue_it() -> None:
    assert not behind("block.down output", reduced("block"), ranks=(0,))


def test_it_is_unknown_without_sources() -> None:
    evidence = with_step(right_evidence(), collectives=(Collective("block", "all_reduce", (0, 1), position=7),))
    assert not is_exchanged_behind(evidence, 0, key("block.down output"))
