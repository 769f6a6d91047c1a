"""The optimizer of a run: a class of torch.optim by name, as DeepSpeed writes it, or what a function returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpcheck.backends.interface import TrainingOptions
from tpcheck.core.errors import BackendError, UsageError
from tpcheck.core.optimizers import NEEDS_A_CLOSURE_OR_SPARSE_GRADIENTS

LEARNING_RATE = 0.01
"""Of optimizers that are named without one: a step of Adam's moves each element by as much, 1 to 10 % of a weight."""


@dataclass(frozen=True, slots=True)
class OptimizerByNames:
    """Makes an optimizer whose step on a parameter depends on its name.

    Attributes:
        make: (names, parameters) -> Optimizer.
    """

    make: Callable[[Sequence[str], Sequence[torch.Tensor]], torch.optim.Optimizer]

    def __call__(self, parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        raise TypeError("an optimizer by names is made of them, too")


def make_optimizer(
    options: TrainingOptions,
    parameters: Sequence[torch.Tensor],
    decays: Sequence[bool] | None = None,
    names: Sequence[str] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer of these parameters; any of them may be a DTensor.

    Args:
        decays: Whether the weights of each parameter decay; None for all. Only for optimizers with a name.
        names: Of the parameters, for an optimizer that asks for them.

    Raises:
        UsageError: torch.optim has no class of that name, or the function returns none.
        BackendError: There are no parameters.
    """
    if not parameters:
        raise BackendError("no parameter of the sharded model requires a gradient on this rank")
    source = options.optimizer
    if isinstance(source, OptimizerByNames):
        return source.make(names, parameters)
    if callable(source):
        made = source(list(parameters))
        if not isinstance(made, torch.optim.Optimizer):
            raise UsageError("optimizer", type(made).__name__, "a callable (parameters) -> torch.optim.Optimizer")
        if _needs_arguments(made.step):
            raise UsageError("optimizer", type(made).__name__, "an optimizer whose step needs no closure")
        return made
    name, params = _named(source, options)
    make: Callable[..., torch.optim.Optimizer] = MuonWithAdamW if name.lower() == "muon" else optimizer_class(name)
    if "foreach" in inspect.signature(make).parameters:
        params = {"foreach": False, **params}  # its kernels refuse a mixture of DTensors and plain tensors
    try:
        return make(_groups(parameters, decays), **params)
    except (TypeError, ValueError) as error:
        raise UsageError("optimizer", source, f"options that {name} takes ({error})") from error


def _needs_arguments(function: Callable[..., Any]) -> bool:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return any(each.default is each.empty and each.kind not in several for each in parameters)


def named_optimizer(options: TrainingOptions) -> tuple[str, dict[str, Any]] | None:
    """Return the name of a class of torch.optim and its options, `lr` among them, and `weight_decay` where it has one.

    None for an optimizer that is made of a list of parameters alone.
    """
    if callable(options.optimizer):
        return None
    name, params = _named(options.optimizer, options)
    if name.lower() == "muon":
        return None
    default = inspect.signature(optimizer_class(name)).parameters.get("weight_decay")
    return name, params if default is None else {"weight_decay": default.default, **params}


def _groups(parameters: Sequence[torch.Tensor], decays: Sequence[bool] | None) -> list[Any]:
    if decays is None:
        return list(parameters)
    with_decay = [parameter for parameter, decay in zip(parameters, decays, strict=True) if decay]
    without = [parameter for parameter, decay in zip(parameters, decays, strict=True) if not decay]
    return [
        *([{"params": with_decay}] if with_decay else []),
        *([{"params": without, "weight_decay": 0.0}] if without else []),
    ]


def _named(source: str | Mapping[str, Any], options: TrainingOptions) -> tuple[str, dict[str, Any]]:
    if not isinstance(source, str):
        return str(source["type"]), {"lr": LEARNING_RATE, **source.get("params", {})}
    if source.lower() != "sgd":
        return source, {"lr": LEARNING_RATE}
    of_sgd = {"lr": options.learning_rate, "momentum": options.momentum, "weight_decay": options.weight_decay}
    return source, of_sgd


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of torch.optim with this name, in any case.

    Raises:
        UsageError: There is none, or it takes no plain step.
    """
    classes = {
        each.lower(): value
        for each, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
        and each not in NEEDS_A_CLOSURE_OR_SPARSE_GRADIENTS
    }
    if name.lower() not in classes:
        raise UsageError("optimizer", name, sorted(value.__name__ for value in classes.values()))
    return classes[name.lower()]


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for matrices, which takes nothing else, and AdamW for the other parameters."""

    def __init__(self, parameters: Sequence[torch.Tensor], lr: float, **options: Any) -> None:
        matrices = [parameter for parameter in parameters if parameter.dim() == 2]
        others = [parameter for parameter in parameters if parameter.dim() != 2]
        muon: Any = optimizer_class("muon")
        self._inner: list[torch.optim.Optimizer] = [
            *([muon(matrices, lr=lr, **options)] if matrices else []),
            *([torch.optim.AdamW(others, lr=lr, foreach=False)] if others else []),
        ]
        super().__init__([group for inner in self._inner for group in inner.param_groups], {"lr": lr})
        for inner in self._inner:
            inner.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for inner in self._inner:
            inner.step()
