"""The reference trains as data parallelism does; its replays are shared between ranks and measure the tolerance."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tpcheck import Topology, UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.loss_scale import LossScale
from tpcheck.model.options import Request, RunOptions
from tpcheck.model.reference import Reference, train_recorded
from tpcheck.numerics.evidence import TensorKey

OPTIONS = TrainingOptions(dtype=torch.float64)


class Squares(nn.Module):
    """A squared error, with a buffer that counts calls and a parameter that one replica alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(3, 1), nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(()))
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor, uses_extra: bool = False) -> torch.Tensor:
        self.calls += 1
        output = self.linear(x) * self.extra if uses_extra else self.linear(x)
        return output.square().mean()


def batch(seed: int, **more: Any) -> dict[str, Any]:
    return {"x": torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), **more}


def model() -> Squares:
    torch.manual_seed(0)
    return Squares().double()


def test_gradients_are_the_mean_over_dp_ranks() -> None:
    (step,) = train_recorded(model(), [[[batch(1)], [batch(2, uses_extra=True)]]], OPTIONS)
    first, second = step
    assert first.gradients is second.gradients
    for name in ("linear.weight", "linear.bias"):
        mean = (first.local_gradients[name] + second.local_gradients[name]) / 2
        torch.testing.assert_close(first.gradients[name], mean)
    assert first.local_gradients["extra"] is None
    torch.testing.assert_close(first.gradients["extra"], second.local_gradients["extra"] / 2)


def test_one_dp_rank_has_no_gradients_beside_the_mean() -> None:
    ((step,),) = train_recorded(model(), [[[batch(1)]]], OPTIONS)
    assert not step.local_gradients
    assert step.gradients["extra"] is None


def test_buffers_belong_to_each_dp_rank() -> None:
    steps = train_recorded(model(), [[[batch(1)], [batch(2)]], [[batch(3)], [batch(4)]]], OPTIONS)
    assert [[float(of_rank.buffers["calls"]) for of_rank in step] for step in steps] == [[1, 1], [2, 2]]


def test_activations_are_recorded_by_step_and_dp_rank() -> None:
    steps = train_recorded(model(), [[[batch(1)], [batch(2)]]], OPTIONS)
    key = TensorKey("forward", "linear", 0, "input", "0")
    assert [torch.equal(steps[0][rank].activations[key], batch(rank + 1)["x"]) for rank in (0, 1)] == [True, True]


def test_a_loss_that_is_not_finite_is_bad_usage() -> None:
    broken = model()
    with torch.no_grad():
        broken.linear.weight.fill_(torch.inf)
    with pytest.raises(UsageError, match="a model whose loss is finite"):
        train_recorded(broken, [[[batch(1)]]], OPTIONS)


def test_a_step_of_two_micro_batches_is_that_of_their_mean() -> None:
    ((step,),) = train_recorded(model(), [[[batch(1), batch(2)]]], OPTIONS)
    ((first, second),) = train_recorded(model(), [[[batch(1)], [batch(2)]]], OPTIONS)
    torch.testing.assert_close(step.gradients["linear.weight"], first.gradients["linear.weight"])
    for number, alone in enumerate((first, second)):
        share = step.micro_gradients[number].mean["linear.weight"]
        torch.testing.assert_close(share, alone.local_gradients["linear.weight"] / 2)
    assert step.loss == pytest.approx((first.loss + second.loss) / 2)
    key = TensorKey("forward", "linear", 0, "input", "0", micro_batch=1)
    assert torch.equal(step.activations[key], batch(2)["x"])


def test_the_optimizers_state_is_kept_by_parameter() -> None:
    ((step,),) = train_recorded(model(), [[[batch(1)]]], replace(OPTIONS, optimizer="adamw"))
    assert {name for name, _ in step.optimizer_state} == {"exp_avg", "exp_avg_sq"}
    assert ("exp_avg", "extra") not in step.optimizer_state  # which got no gradient


class Rank:
    """A rank that gathers its value alone."""

    device = torch.device("cpu")

    def __init__(self, rank: int, topology: Topology) -> None:
        self.rank, self.topology = rank, topology
        self.gathered: list[Any] = []

    def group(self, axis: str) -> None: ...

    def gather(self, value: Any) -> tuple[Any, ...]:
        self.gathered.append(value)
        return (value,)


def reference(build: Any = model, topology: Topology = Topology(tp=2), rank: int = 0) -> tuple[Reference, Rank]:  # noqa: B008 - immutable
    rank_of_world = Rank(rank, topology)
    request = Request(build, RunOptions(batch=batch(1), steps=2, replays=3))
    return Reference.build(request, rank_of_world, OPTIONS), rank_of_world


def test_the_tolerance_is_the_largest_deviation_of_the_perturbed_replays() -> None:
    trained, rank = reference()
    steps, tolerance = trained.train(rank)
    not_repeated, measured = rank.gathered
    assert not not_repeated
    assert tolerance.deviations == measured
    assert {(0, "gradient", "linear.weight"), (1, "weight", "linear.bias"), (1, "norm")} <= set(measured)
    assert {(0, 0, "loss"), (1, 0, "buffer", "calls")} <= set(measured)
    key = TensorKey("backward", "linear", 0, "output", "0")
    assert 0 < tolerance.deviations[1, 0, key] < 1e-12 * float(steps[1][0].activations[key].norm())


def test_ranks_share_the_replays() -> None:
    seeds: list[int] = []
    for rank in (0, 1):
        measured, rank_of_world = reference(rank=rank)
        measured.measure(rank_of_world, lambda perturbation: seeds.append(perturbation.generator.initial_seed()) or {})
    assert seeds == [0, 2, 1, 3]


class Random(Squares):
    def forward(self, x: torch.Tensor, uses_extra: bool = False) -> torch.Tensor:
        return super().forward(x + torch.rand(1, dtype=x.dtype))


class RoundsOtherwise(Squares):
    """As kernels that add with atomic operations, in another order each time."""

    numbers = itertools.count(1)
    size = 1.0

    def forward(self, x: torch.Tensor, uses_extra: bool = False) -> torch.Tensor:
        return super().forward(x * (1 + self.size * torch.finfo(x.dtype).eps * (next(self.numbers) % 3)))


class DrawsAsSmall(RoundsOtherwise):
    def forward(self, x: torch.Tensor, uses_extra: bool = False) -> torch.Tensor:
        return super().forward(x + 0 * torch.rand(1, dtype=x.dtype))


class ChangesMore(RoundsOtherwise):
    size = 1e3


def test_kernels_that_round_otherwise_each_time_are_no_error() -> None:
    trained, rank = reference(lambda: RoundsOtherwise())
    trained.train(rank)


@pytest.mark.parametrize("build", [DrawsAsSmall, ChangesMore])
def test_what_is_no_rounding_is_refused(build: Any) -> None:
    trained, rank = reference(lambda: build())
    with pytest.raises(UsageError, match="computes the same each time"):
        trained.train(rank)


def test_a_model_that_draws_random_numbers_is_bad_usage() -> None:
    trained, rank = reference(lambda: Random())
    with pytest.raises(UsageError, match="computes the same each time"):
        trained.train(rank)


def test_a_scaled_loss_trains_as_one_that_is_not_scaled() -> None:
    data = [[[{"x": batch(1)["x"].half()}], [{"x": batch(2)["x"].half()}]]]
    unscaled = replace(OPTIONS, dtype=torch.float16)
    (expected,) = train_recorded(model().half(), data, unscaled)
    (step,) = train_recorded(model().half(), data, replace(unscaled, loss_scale=lambda: LossScale(64.0)))
    assert (step[0].loss_scale, step[0].is_skipped) == (64.0, False)
    for of_rank, expected_of_rank in zip(step, expected, strict=True):
        assert of_rank.loss == expected_of_rank.loss
        for name in ("linear.weight", "linear.bias"):
            torch.testing.assert_close(of_rank.weights[name], expected_of_rank.weights[name])
            for gradients in ("gradients", "local_gradients"):
                actual, wanted = (getattr(each, gradients)[name].float() for each in (of_rank, expected_of_rank))
                torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)
    scaled = [key for key in expected[0].activations if key.phase == "backward"]
    assert scaled
    for key in scaled:
        torch.testing.assert_close(step[0].activations[key] / 64, expected[0].activations[key], rtol=1e-2, atol=1e-3)


def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved() -> None:
    scaled = replace(OPTIONS, dtype=torch.float16, loss_scale=lambda: LossScale(2.0**18, window=5))
    data = [[[{"x": batch(number)["x"].half() / 4}]] for number in (1, 1, 1)]
    start = {name: each.clone() for name, each in model().half().named_parameters()}
    steps = [of_rank for (of_rank,) in train_recorded(model().half(), data, scaled)]
    scales = [step.loss_scale for step in steps]
    skipped = [step.is_skipped for step in steps]
    assert skipped[0]
    assert scales == [2.0**18, 2.0**17, 2.0 ** (16 if skipped[1] else 17)]
    assert steps[0].gradient_norm is None
    assert set(steps[0].gradients.values()) == {None}
    assert all(key.phase == "forward" for key in steps[0].activations)
    assert all(torch.equal(steps[0].weights[name], start[name]) for name in start)
