"""Tensor parallelism that is written by hand: right code of every style passes, mistakes are found alone.

Every second mistake: `ci/faults` injects all.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpcheck import Topology
from tpcheck.backends.interface import RankLike
from tpcheck.lab.faults.clipping import scaled_to_norm, small_loss
from tpcheck.lab.faults.corpus import HAND_WRITTEN_CONTROLS, HAND_WRITTEN_FAULTS
from tpcheck.lab.faults.hand_written import HandWrittenControl, HandWrittenFault
from tpcheck.lab.faults.hand_written_model import Model, compiled_whole, inside
from tpcheck.lab.faults.losses import over_the_ranks
from tpcheck.lab.faults.runs import run_hand_written_control, run_hand_written_fault, verify_hand_written
from tpcheck.world.world import World, spawn

REPLAYS = 2  # mistakes stand far above the noise of any number of replays
LEAST_MARGIN = 1e3
CONTROLS = [control for control in HAND_WRITTEN_CONTROLS if control.style is not compiled_whole]  # which takes seconds


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[Topology, World]]:
    """Yield a world of each topology, which serves all rows: a row alone takes less time than its world."""
    opened: dict[Topology, World] = {}
    try:
        for topology in dict.fromkeys(row.topology for row in (*HAND_WRITTEN_FAULTS, *HAND_WRITTEN_CONTROLS)):
            opened[topology] = spawn(topology, timeout=120).__enter__()
        yield opened
    finally:
        for world in opened.values():
            world.__exit__(None, None, None)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_right_code_passes(control: HandWrittenControl, worlds: dict[Topology, World]) -> None:
    result = run_hand_written_control(control, world=worlds[control.topology])
    assert result.verdict == "passed", result.message
    assert result.margin < 0.5


@pytest.mark.parametrize("fault", HAND_WRITTEN_FAULTS[::2], ids=lambda fault: fault.name)
def test_a_mistake_is_found_alone(fault: HandWrittenFault, worlds: dict[Topology, World]) -> None:
    result = run_hand_written_fault(fault, replays=REPLAYS, world=worlds[fault.topology])
    assert result.caught, result.message
    assert result.place_is_right, (result.place, result.true_places, result.checks)
    assert result.cause_is_right, (result.cause, result.true_causes)
    assert result.margin > LEAST_MARGIN


def reduce_left_out_on_one_rank(model: Model, rank: RankLike) -> None:
    """Leave the others waiting: no comparison shows that, torch's check of collectives does."""
    if rank.topology.coordinate(rank.rank)["tp"] == 1:
        model.block(1).mlp.leave = lambda tensor: tensor


def detached_on_one_rank(model: Model, rank: RankLike) -> None:
    """Let one rank leave out a collective of the backward pass, in which the others wait for it."""
    if rank.topology.coordinate(rank.rank)["tp"] == 1:
        leave = model.block(1).mlp.leave
        model.block(1).mlp.leave = lambda tensor: leave(tensor.detach())


def no_gradient_on_one_rank(model: Model, rank: RankLike) -> None:
    if rank.topology.coordinate(rank.rank)["tp"] == 1:
        model.loss.register_forward_hook(lambda module, args, loss: loss.detach())


def test_a_rank_that_leaves_out_a_reduction_is_named_with_what_the_others_issued() -> None:
    """At once, from a world of its own, whose timeout is far longer."""
    control = HandWrittenControl(inside, also=reduce_left_out_on_one_rank)
    result = run_hand_written_control(control, replays=REPLAYS)
    assert result.verdict == "error"
    assert str(result.message).startswith(
        "rank 1 did not issue the all_reduce over tp in the forward of blocks.1.mlp that rank 0 issued, and went on to "
        "an all_reduce over tp in the forward of loss."
    )


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])  # in bfloat16 the pass with teacher forcing comes first
def test_a_rank_whose_backward_pass_is_another_is_named_in_an_open_world_too(dtype: str) -> None:
    control = HandWrittenControl(inside, also=detached_on_one_rank)
    with spawn(Topology(tp=2), timeout=120) as world:
        report = verify_hand_written(control, dtype=dtype, replays=1, world=world)
    assert not report.verdict.is_internal_error
    assert str(report.verdict.message).startswith(
        "rank 1 did not issue the all_reduce over tp in the backward pass after the gradient of input 0 of "
        "blocks.1.mlp.up that rank 0 issued. No gradient comes back to output 0 of blocks.1.mlp on rank 1."
    )


def test_a_rank_whose_loss_has_no_gradient_is_named() -> None:
    with spawn(Topology(tp=2), timeout=120) as world:
        report = verify_hand_written(HandWrittenControl(inside, also=no_gradient_on_one_rank), replays=1, world=world)
    message = str(report.verdict.message)
    assert message.startswith("custom, forward of step 0: the sharded model returns a loss without a gradient")
    assert "raised by rank 1; rank 0" in message


def test_gradients_that_float32_scales_up_without_an_epsilon_pass(worlds: dict[Topology, World]) -> None:
    """How they are scaled is read off the moments: the reference's own step is too small to show in its weights."""
    control = HandWrittenControl(inside, {"loss": small_loss}, also=over_the_ranks, clip=scaled_to_norm)
    report = verify_hand_written(control, dtype="float32", replays=REPLAYS, world=worlds[control.topology])
    report.raise_if_failed()
    assert next(check.compared for check in report.verdict.checks if check.check == "updates_match_reference") == 20


def test_both_norms_over_one_shard_are_found(worlds: dict[Topology, World]) -> None:
    fault = next(fault for fault in HAND_WRITTEN_FAULTS if fault.name == "statistic_over_one_shard")
    report = verify_hand_written(
        HandWrittenControl(fault.style, fault.options, also=fault.inject), world=worlds[fault.topology]
    )
    assert [finding.where["module"] for finding in report.findings if finding.cause in fault.causes] == [*fault.places]
