"""Megatron-core's GPT passes with and without sequence parallelism, and faults in it are found where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tests.backends import megatron_models as models
from tpcheck import Rank, Report, Topology, UsageError, World
from tpcheck.backends.registry import modules_of
from tpcheck.core.placement import Shard
from tpcheck.lab.faults.fault import FaultyBackend, Live

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="Megatron is not installed")  # 2 s to import

IMPORTED = ("tpcheck.model.rank_run", *modules_of("megatron"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Return ranks that verify one model after another, as under torchrun; the forkserver imports Megatron."""
    with tpcheck.spawn(Topology(tp=2), timeout=300, also=IMPORTED) as world:
        yield world


def verified(rank: Rank, build: Callable[[], Any], batch: Any, options: dict[str, Any]) -> Report:
    return tpcheck.verify(build, batch, topology=rank.topology, **{"backend": "megatron", **options})


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_gpt_passes(world: World, sequence_parallel: bool) -> None:
    options = {"config": {"sequence_parallel": sequence_parallel}}
    report = world.run(verified, models.build, None, options)[0]
    assert report.passed, report


def test_a_model_of_its_layers_passes(world: World) -> None:
    report = world.run(verified, models.Layers, models.tokens, {})[0]
    assert report.passed, report


def test_models_made_from_scratch_pass_where_no_fan_is_counted_on_shards(world: World) -> None:
    """Megatron gives a function that initialises the whole tensor, or each rank's part of it."""
    options = {"checks": ["initialisation_matches_reference"]}
    report = world.run(verified, models.build, None, options)[0]
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total > 100
    by_fans = world.run(verified, models.Layers, models.tokens, options)[0]
    assert {finding.cause for finding in by_fans.findings} == {"init_depends_on_tp"}
    assert all("(model-parallel generators)" in finding.where["field"] for finding in by_fans.findings)


def test_a_gpt_passes_over_dp() -> None:
    report = tpcheck.verify(models.build, topology=Topology(tp=1, dp=2), backend="megatron", steps=1, timeout=180)
    assert report.passed, report


PER_TOKEN = {
    "config": {"calculate_per_token_loss": True}, "loss": "token_mean", "accumulate": 2, "steps": 1, "replays": 2,
}  # fmt: skip


def per_token(rank: Rank) -> tuple[Report, Report]:
    faulty = FaultyBackend(models.last_micro_batch_counted, "megatron")
    options = ({}, {"backend": faulty})
    right, wrong = (verified(rank, models.build, models.labelled, {**PER_TOKEN, **more}) for more in options)
    return right, wrong


def test_losses_per_token_are_divided_by_all_labels_of_the_step() -> None:
    with tpcheck.spawn(Topology(tp=1, dp=2), timeout=300, also=IMPORTED) as world:
        right, wrong = world.run(per_token)[0]
    assert right.passed, right
    first = wrong.findings[0]
    assert (first.check, first.cause) == ("gradients_match_reference", "gradient_scaled")


DISTRIBUTED: dict[str, Any] = {
    "config": {"use_distributed_optimizer": True}, "optimizer": "adamw", "replays": 2,
}  # fmt: skip


def with_distributed_optimizer(topology: Topology, fault: Callable[[Live], None] | None = None) -> Report:
    backend: Any = "megatron" if fault is None else FaultyBackend(fault, "megatron")
    options = {**DISTRIBUTED, "backend": backend, "steps": 2 if fault is None else 1}
    return tpcheck.verify(models.build, topology=topology, timeout=180, **options)


def test_the_distributed_optimizer_passes() -> None:
    report = with_distributed_optimizer(Topology(tp=2, dp=2))
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total > 1000


def test_a_bucket_that_is_not_gathered_is_found() -> None:
    report = with_distributed_optimizer(Topology(dp=2), models.bucket_not_gathered)
    assert {"stale_weight", "replica_drift"} <= {finding.cause for finding in report.findings}
    assert "replicas_agree" in {finding.check for finding in report.findings}


def test_moments_of_another_rank_are_found() -> None:
    first = with_distributed_optimizer(Topology(tp=2), models.moments_of_another_rank).findings[0]
    assert (first.check, first.cause) == ("optimizer_state_matches_reference", "optimizer_state_of_another_rank")


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", {"type": "AdamW", "params": {"amsgrad": True}}])
def test_what_the_distributed_optimizer_does_not_step_is_refused(optimizer: Any) -> None:
    from tpcheck.backends.interface import TrainingOptions
    from tpcheck.backends.megatron.backend import MegatronBackend

    options = TrainingOptions(torch.float64, optimizer=optimizer, config=DISTRIBUTED["config"])
    with pytest.raises(UsageError, match="expected adamw with use_distributed_optimizer"):
        MegatronBackend().resolved(options)


@pytest.mark.parametrize(
    ("inject", "sequence_parallel", "expected"),
    [
        (
            models.norm_not_marked,
            True,
            ("gradients_match_reference", f"{models.FIRST}.input_layernorm", "partial_gradient_on_replica"),
        ),
        (
            models.reduce_skipped,
            False,
            ("outputs_match_reference", f"{models.LAST}.mlp.linear_fc2", "missing_reduce"),
        ),
        (
            models.stride_ignored,
            False,
            ("weights_match_reference", f"{models.FIRST}.mlp.linear_fc1", "fused_blocks_interleaved"),
        ),
    ],
)
def test_a_fault_is_found_where_it_is(
    world: World, inject: Callable[[Live], None], sequence_parallel: bool, expected: tuple[str, str, str]
) -> None:
    options = {
        "backend": FaultyBackend(inject, "megatron"),
        "config": {"sequence_parallel": sequence_parallel},
        "steps": 1,
    }
    first = world.run(verified, models.build, None, options)[0].findings[0]
    assert (first.check, first.where["module"], first.cause) == expected


def test_label_smoothing_over_the_local_vocabulary_is_found(world: World) -> None:
    """As in megatron-core 0.16.1 (https://github.com/NVIDIA/Megatron-LM/issues/737)."""
    first = world.run(verified, models.SmoothedLoss, models.tokens, {"steps": 1})[0].findings[0]
    assert (first.check, first.where["module"]) == ("outputs_match_reference", "")
    assert (first.cause, first.evidence["lost"]) == ("missing_reduce", "mean over the vocabulary")


def marks_agree(rank: Rank) -> bool:
    """Return whether the layouts of a live model are those that its candidate has from the unsharded shapes."""
    from tpcheck.backends.interface import TrainingOptions
    from tpcheck.backends.megatron.backend import MegatronBackend
    from tpcheck.backends.megatron.session import groups_of_topology, use_groups
    from tpcheck.backends.registry import layouts_of

    backend, options = MegatronBackend(), TrainingOptions(dtype=torch.float32, rebuild=models.build)
    with backend.session(options):
        candidate = backend.shard(models.build(), rank, options)
        with use_groups(groups_of_topology(rank.topology)):
            live = layouts_of(candidate.module)
    expected = candidate.layouts()
    return live.keys() == expected.keys() and all(
        live[name].placement() == expected[name].placement() for name in expected
    )


def test_the_layouts_of_a_live_model_follow_from_its_marks(world: World) -> None:
    assert all(world.run(marks_agree))


def sums_over_own_groups(rank: Rank, number: int) -> list[float]:
    """Return sums over a group that its members alone create, as `Rank.group` does, in each of some sessions and after.

    Each session also creates groups of its own, and destroys them.
    """
    import torch.distributed as dist

    from tpcheck.backends.interface import TrainingOptions
    from tpcheck.backends.megatron.backend import MegatronBackend
    from tpcheck.backends.megatron.session import groups_of_topology

    def total(group: Any) -> float:
        term = torch.ones(())
        dist.all_reduce(term, group=group)
        return float(term)

    totals = []
    for _ in range(number):
        with MegatronBackend().session(TrainingOptions(dtype=torch.float32)):
            groups_of_topology(rank.topology)
            group = dist.new_group([0, 1], use_local_synchronization=True)
            totals.append(total(group))
        totals.append(total(group))
    return totals


def test_the_groups_of_a_rank_outlive_a_session(world: World) -> None:
    """Destroyed, and created again, they found the addresses of the last ones in the store: connection refused."""
    assert world.run(sums_over_own_groups, 3) == ([2.0] * 6,) * 2


@pytest.mark.slow
def test_one_world_verifies_one_model_after_another() -> None:
    with tpcheck.spawn(Topology(tp=2, dp=2), timeout=300) as world:
        for _ in range(3):
            report = world.run(verified, models.build, None, {"steps": 1, "replays": 2})[0]
            assert report.passed, report


def resumed(rank: Rank, folder: str) -> tuple[bool, int]:
    """Return whether a new model holds the weights and moments of the one that was saved, and of how many tensors."""
    from tpcheck.backends.interface import TrainingOptions
    from tpcheck.backends.megatron.backend import MegatronBackend
    from tpcheck.model.build import loss_of

    backend = MegatronBackend()
    options = TrainingOptions(dtype=torch.float32, rebuild=models.Layers, optimizer="adamw")
    held = []
    with backend.session(options):
        for seed, act in ((0, "save"), (1, "load")):
            torch.manual_seed(seed)
            candidate: Any = backend.shard(models.Layers(), rank, options)
            if act == "save":
                candidate.backward(loss_of(candidate.forward(models.tokens({"dp": 0}, 0))))
                candidate.step()
            (way,) = candidate.ways_to_resume().values()
            getattr(way, act)(Path(folder))
            names = list(candidate.layouts())
            states = {(name, key): value for name in names for key, value in candidate.optimizer_state(name).items()}
            held.append({**states, **{(name, "weight"): candidate.parameter(name) for name in names}})
    first, second = held
    same = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return same, len(first)


@pytest.mark.slow
def test_a_training_goes_on_from_a_distributed_checkpoint(world: World, tmp_path: Path) -> None:
    weights_and_moments = 3 * 6
    assert world.run(resumed, str(tmp_path)) == ((True, weights_and_moments),) * 2


def test_the_partition_stride_is_the_number_of_blocks() -> None:
    from tpcheck.backends.megatron.backend import parameter_layouts

    sharded = nn.Linear(4, 6)
    for name, value in {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 3}.items():
        setattr(sharded.weight, name, value)
    found = parameter_layouts(sharded, nn.Linear(4, 12), tp=2)
    assert found["weight"].placement() == Shard(0, blocks=(4, 4, 4), sizes=((2, 2),) * 3)
    assert found["bias"].placement() == Shard(0, sizes=((6, 6),))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 10), "pad the vocabulary for the largest"),
        (nn.Linear(4, 12, bias=False), "bias.*expected a model with the same parameters"),
    ],
)
def test_a_model_whose_parameters_depend_on_the_tensor_parallel_size_is_refused(model: nn.Module, message: str) -> None:
    from tpcheck.backends.megatron.backend import parameter_layouts

    with pytest.raises(UsageError, match=message):
        parameter_layouts(nn.Linear(4, 6), model, tp=2)


def test_families_are_refused() -> None:
    from tpcheck.backends.megatron.config import megatron_config

    with pytest.raises(UsageError, match="families are models of transformers, so give a build function"):
        megatron_config(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"sequence_parallell": True}}, "a field of Megatron's TransformerConfig"),
        ({"config": {"tensor_model_parallel_size": 2}}, "none: the topology sets it"),
        ({"config": {"context_parallel_size": 2}}, "1: only tp and dp are verified"),
        ({"config": {"recompute_granularity": "full"}}, "None: it is not verified, and always off"),
        ({"config": {"calculate_per_token_loss": True}}, "token_mean with calculate_per_token_loss"),
        ({"zero_stage": 1}, "Megatron's is use_distributed_optimizer, in config"),
        ({"ignore_plan": True}, "Megatron has no plans"),
    ],
)
def test_options_that_cannot_be_verified_are_refused(options: dict[str, Any], message: str) -> None:
    from tpcheck.backends.interface import TrainingOptions
    from tpcheck.backends.megatron.backend import MegatronBackend

    with pytest.raises(UsageError, match=message):
        MegatronBackend().resolved(TrainingOptions(dtype=torch.float64, **options))
