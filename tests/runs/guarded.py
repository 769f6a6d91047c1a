"""Training loops under `tpcheck.guard`, right and wrong, as functions that ranks run."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

import tpcheck
from tests.runs.loops.hand_written import Training
from tests.runs.loops.loop import Run
from tpcheck import Finding, Rank

NORM = "blocks.1.norm.weight"
LAST_RIGHT, WRONG = 2, 3  # steps


@dataclass(slots=True)
class Result:
    """What a rank has seen.

    Attributes:
        findings: Of the Mismatch, or of the reports that were called back.
        text: Of the Mismatch.
        calls: Of the model, with gradients.
        warned: Texts of the warnings.
        logged: What the guard logged.
        failure: Text of a RankFailure.
    """

    findings: list[Finding] = field(default_factory=list)
    text: str = ""
    calls: int = 0
    warned: list[str] = field(default_factory=list)
    logged: list[Mapping[str, float]] = field(default_factory=list)
    failure: str = ""

    def __getitem__(self, place: int) -> Finding:
        return self.findings[place]


@dataclass(frozen=True, slots=True)
class GuardedRun(Run):
    """A run whose loop is guarded instead of recorded; `options` are those of the guard."""

    def record(self, model: Any, optimizer: Any = None) -> AbstractContextManager[Any]:
        return tpcheck.guard(model, **{"optimizer": optimizer, "topology": self.rank.topology, **self.options})


def train(rank: Rank, training: Any, options: Mapping[str, Any], *, calls_back: bool = False, **guard: Any) -> Result:
    """Train under a guard and return what this rank saw of it."""
    result = Result()
    guard = {"every": 1, "timeout": 20, "log": result.logged.append, **guard}
    if calls_back:
        guard["on_mismatch"] = lambda report: result.findings.extend(report.findings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = training(GuardedRun(rank, None, guard), **options)
        try:
            made.train()
        except tpcheck.Mismatch as mismatch:
            result.findings, result.text = list(mismatch.report.findings), mismatch.report.to_text()
        except tpcheck.RankFailure as failure:
            result.failure = str(failure)
    result.warned = [str(warning.message) for warning in caught if "replicas_agree" in str(warning.message)]
    result.calls = getattr(made, "num_losses", 0)
    return result


class Counted(Training):
    """AdamW; counts its calls."""

    steps = 6
    optimizer = "AdamW"
    optimizer_options = (("lr", 0.01),)
    num_losses = 0
    rank_at_fault = 1

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = super().loss(tokens, labels)
        self.num_losses += 1
        return loss

    @property
    def is_at_fault(self) -> bool:
        return self.run.rank.rank == self.rank_at_fault

    def after_step(self, step: int) -> None:
        if step == LAST_RIGHT and self.is_at_fault:
            with torch.no_grad():
                self.spoil()

    def spoil(self) -> None:
        """Do wrong, on one rank, after the third step."""


class NudgesANorm(Counted):
    def spoil(self) -> None:
        self.parameters()[NORM][0] += 1e-9


class NudgesAShard(Counted):
    rank_at_fault = 2

    def spoil(self) -> None:
        self.parameters()["blocks.0.up.weight"][0, 0] += 1e-9


class SpoilsMoments(Counted):
    def spoil(self) -> None:
        self.optimizers[0].state[self.parameters()[NORM]]["exp_avg_sq"] *= 2


class RaisesTheRate(Counted):
    def spoil(self) -> None:
        self.optimizers[0].param_groups[0]["lr"] = 0.0101


class SkipsAStep(Counted):
    def update(self, step: int) -> None:
        if not (step == LAST_RIGHT and self.is_at_fault):
            super().update(step)


class OtherBatch(Counted):
    def tokens(self, step: int) -> torch.Tensor:
        tokens = super().tokens(step)
        if step == WRONG and self.is_at_fault:
            tokens[0, 0] = (tokens[0, 0] + 1) % 32
        return tokens


class NotANumber(Counted):
    def reduce_gradients(self) -> None:
        super().reduce_gradients()
        if self.num_losses == WRONG:
            self.gradients()[NORM][0] = float("nan")


class Scaler:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


class Accelerated:
    """An optimizer with the attributes of accelerate's wrapper."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.scaler = optimizer, Scaler(256.0)


class ScalesItsLossAlone(Counted):
    def recorded_optimizer(self) -> Any:
        self.accelerated = Accelerated(self.optimizers[0])
        return self.accelerated

    def spoil(self) -> None:
        self.accelerated.scaler.scale = 128.0


class PartialGradientOfANorm(Counted):
    """Sequence parallelism without the sum over the ranks: the norms part at the first step."""

    sequence = True

    def hook_gradient(self, name: str, parameter: torch.Tensor) -> None:
        if name != NORM:
            super().hook_gradient(name, parameter)


class ZeroBiases(Counted):
    """Sharded biases begin alike, as zeros, and part: they are shards."""

    def build(self) -> Any:
        model = super().build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
        return model


class NudgesABiasThatBeganAsZero(ZeroBiases, Counted):
    def spoil(self) -> None:
        self.parameters()["blocks.1.down.bias"][0] += 1e-9


class Raises(Counted):
    def spoil(self) -> None:
        raise ValueError("the loop is wrong")


def die_in_a_loop(every: int, victim: int) -> None:
    """Train under torchrun's variables; write when the victim dies, and what the others raise."""
    rank = tpcheck.attach(tpcheck.Topology(tp=2), device="cpu")

    def write(*words: Any) -> None:
        os.write(1, f"{words[0]} {time.time()} {' '.join(map(str, words[1:]))}\n".encode())

    class Dies(Counted):
        rank_at_fault = victim

        def after_step(self, step: int) -> None:
            if step == LAST_RIGHT:
                write("START")
            super().after_step(step)

        def spoil(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        Dies(GuardedRun(rank, None, {"every": every})).train()
    except tpcheck.RankFailure as failure:
        write("END", failure.first, failure)
        os._exit(0)


class RootMeanSquareNorm(torch.nn.Module):
    """A norm that no backend knows, with a weight of ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


class Scale(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden


class PartialGradientOfACustomNorm(PartialGradientOfANorm):
    """No norm's gradient is summed over the ranks, which have other positions."""

    def build(self) -> Any:
        model = super().build()
        for block in model.blocks:
            block.norm = RootMeanSquareNorm(block.norm.weight.numel())
        return model


class NudgesACustomScale(Counted):
    """A vector of ones on a replicated activation, which one rank moves after its first step."""

    def build(self) -> Any:
        model = super().build()
        model.blocks[1].norm = torch.nn.Sequential(model.blocks[1].norm, Scale(model.blocks[1].norm.weight.numel()))
        return model

    def after_step(self, step: int) -> None:
        if step == 0 and self.is_at_fault:
            with torch.no_grad():
                self.parameters()["blocks.1.norm.1.weight"][0] += 1e-9


class ScalesShards(Counted):
    """A vector of ones on each rank's columns: its shards begin with equal bits, and part."""

    def build(self) -> Any:
        model = super().build()
        for block in model.blocks:
            block.up = torch.nn.Sequential(block.up, Scale(block.up.weight.shape[0]))
        return model
