"""An optimizer by name, as DeepSpeed writes it, or what a function returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpcheck import UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.optimizer import LEARNING_RATE, make_optimizer, named_optimizer
from tpcheck.backends.sgd import Sgd, clip_gradients


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))]


def options(optimizer: Any, **changes: Any) -> TrainingOptions:
    return TrainingOptions(dtype=torch.float32, optimizer=optimizer, **changes)


@pytest.mark.parametrize(
    ("source", "kind", "group"),
    [
        ("sgd", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        ("AdamW", torch.optim.AdamW, {"lr": LEARNING_RATE}),
        ("adafactor", torch.optim.Adafactor, {"lr": LEARNING_RATE}),
        ({"type": "AdamW", "params": {"lr": 0.5, "betas": (0.1, 0.2)}}, torch.optim.AdamW, {"lr": 0.5}),
        (lambda given: torch.optim.NAdam(given, lr=0.25), torch.optim.NAdam, {"lr": 0.25}),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, dict)) else "",
)
def test_the_optimizer_is_the_one_that_is_named(source: Any, kind: type, group: dict[str, Any]) -> None:
    made = make_optimizer(options(source), parameters())
    assert isinstance(made, kind)
    assert group.items() <= made.param_groups[0].items()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("adamv", "optimizer='adamv': expected one of"),
        ("lbfgs", "optimizer='lbfgs': expected one of"),
        ({"type": "AdamW", "params": {"beta": 1}}, "options that AdamW takes"),
        (lambda given: None, "a callable"),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, dict)) else "",
)
def test_what_is_no_optimizer_is_bad_usage(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_optimizer(options(source), parameters())


class Composite(torch.optim.Optimizer):
    """Steps by others, and has no rate of its own."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.SGD(parameters, lr=0.1)
        super().__init__(parameters, {})

    def step(self, *arguments: Any, **named: Any) -> None:  # type: ignore[override]
        self.inner.step()


def test_an_optimizer_without_a_rate_in_its_groups_steps() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    stepper = Sgd([weight], TrainingOptions(dtype=torch.float32, optimizer=Composite), None)
    stepper.step()
    assert torch.equal(weight, torch.full((2,), 0.9))
    assert stepper.learning_rate != stepper.learning_rate


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    options = TrainingOptions(dtype=torch.float32, optimizer=torch.optim.LBFGS)
    with pytest.raises(UsageError, match=r"LBFGS.*no closure"):
        make_optimizer(options, [torch.nn.Parameter(torch.ones(2))])


def test_muon_steps_matrices_and_adamw_the_rest() -> None:
    given = parameters()
    made = make_optimizer(options("muon"), given)
    for parameter in given:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    assert set(made.state[given[0]]) == {"momentum_buffer"}
    assert {"exp_avg", "exp_avg_sq"} <= set(made.state[given[1]])
    assert all(not torch.equal(parameter, torch.ones_like(parameter)) for parameter in given)


def test_a_schedule_follows_the_steps() -> None:
    def half_each_step(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    sgd = Sgd(parameters(), options("adamw", schedule=half_each_step), clip_gradients)
    rates = []
    for _ in range(3):
        rates.append(sgd.optimizer.param_groups[0]["lr"])
        sgd.step()
    assert rates == pytest.approx([LEARNING_RATE, LEARNING_RATE / 2, LEARNING_RATE / 4])


def test_states_have_the_shape_of_the_parameter_and_masters_stand_beside_them() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    sgd = Sgd([parameter], options("adamw"), clip_gradients)
    parameter.grad = torch.ones_like(parameter)
    sgd.step()
    states = sgd.state(parameter)
    assert set(states) == {"master", "exp_avg", "exp_avg_sq"}  # no step count
    assert {state.dtype for state in states.values()} == {torch.float32}


def test_parameters_that_do_not_decay_are_a_group_of_their_own() -> None:
    matrix, vector = parameters()
    made = make_optimizer(options("adamw"), [matrix, vector], [True, False])
    assert [(group["params"], group["weight_decay"]) for group in made.param_groups] == [
        ([matrix], 0.01),
        ([vector], 0.0),
    ]
    assert len(make_optimizer(options("sgd"), [vector], [False]).param_groups) == 1


def test_an_optimizer_that_is_made_of_a_list_alone_has_no_name() -> None:
    assert named_optimizer(options("AdamW")) == ("AdamW", {"lr": LEARNING_RATE, "weight_decay": 0.01})
    assert named_optimizer(options({"type": "rprop", "params": {"lr": 1.0}})) == ("rprop", {"lr": 1.0})
    assert named_optimizer(options("muon")) is None
    assert named_optimizer(options(torch.optim.SGD)) is None
