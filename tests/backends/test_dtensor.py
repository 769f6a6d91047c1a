"""Plans in torch's styles: tensor and sequence parallel, a loss over vocabulary shards, with and without FSDP2."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

import tpcheck
from tests.backends.hand_made import Model, tokens
from tpcheck import Rank, Topology, UsageError
from tpcheck.backends.dtensor.backend import DTensorBackend, model_tp_plan, restore_tied_embeddings, styles
from tpcheck.backends.dtensor.candidate import clip_by_mesh, mesh_groups, parameter_layouts
from tpcheck.backends.interface import TrainingOptions
from tpcheck.model.candidate import hint_to_shard

TP = Topology(tp=2)
PLAN = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
SEQUENCE = {
    "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "layers.*.norm": SequenceParallel(use_local_output=True),
    "layers.*.up": ColwiseParallel(input_layouts=Shard(1)),
    "layers.*.down": RowwiseParallel(output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
SHARDED_LOGITS = {**PLAN, "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}

verified = partial(tpcheck.verify, Model, tokens, backend="dtensor", timeout=180)


@pytest.mark.parametrize("topology", [TP, Topology(tp=2, dp=2), Topology(tp=1, dp=2)])
def test_a_plan_passes(topology: Topology) -> None:
    report = verified(topology=topology, config={"plan": PLAN})
    assert report.passed, report


def test_sequence_parallel_passes() -> None:
    report = verified(topology=TP, config={"plan": SEQUENCE})
    assert report.passed, report


def test_a_loss_over_shards_of_the_vocabulary_passes() -> None:
    report = verified(topology=TP, config={"plan": SHARDED_LOGITS, "loss_parallel": True})
    assert report.passed, report


@pytest.mark.parametrize("topology", [TP, Topology(tp=2, dp=2)])
def test_the_tp_plan_of_a_transformers_model_passes(topology: Topology) -> None:
    report = tpcheck.verify_family("qwen3", topology=topology, backend="dtensor", timeout=180)
    assert report.passed, report


def test_both_ways_to_save_write_the_model() -> None:
    report = verified(topology=Topology(tp=2, dp=2), config={"plan": PLAN}, checks=["checkpoint_matches_reference"])
    assert report.passed, report


def test_what_the_plan_cannot_name_is_refused_before_a_model_is_built() -> None:
    backend = DTensorBackend()
    for options, message in (
        (
            {"config": {"plan": {"layers.*.up": "packed"}}},
            r"config.plan\['layers.\*.up'\]='packed': expected one of colwise",
        ),
        ({"config": {"plans": {}}}, "config='plans': expected one of plan, loss_parallel"),
        ({"zero_stage": 1}, "zero_stage=1: expected 0"),
        ({"ignore_plan": True}, "ignore_plan=True: expected False: torch has no heuristics"),
    ):
        with pytest.raises(UsageError, match=message):
            backend.resolved(TrainingOptions(dtype=torch.float64, **options))


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(UsageError, match=r"config\.plan=None: expected a dict of styles .*: Model has no plan"):
        model_tp_plan(Model())


def test_a_style_of_torch_is_taken_as_it_is() -> None:
    style = ColwiseParallel()
    assert styles({"up": style, "down": "rowwise"})["up"] is style


def clipped(rank: Rank) -> tuple[float, list[torch.Tensor]]:
    """Clip a DTensor gradient with norm 6 and a plain gradient with norm 8 to norm 5."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(torch.full((4,), 3.0), mesh, [Shard(0)])
    plain = nn.Parameter(torch.zeros(1))
    plain.grad = torch.full((1,), 8.0)
    norm = clip_by_mesh([sharded, plain, nn.Parameter(torch.zeros(1))], 5.0)
    return norm, [sharded.grad.full_tensor(), plain.grad]


def test_gradients_on_several_meshes_are_clipped_by_one_norm() -> None:
    with tpcheck.spawn(TP, timeout=120) as world:
        for norm, (sharded, plain) in world.run(clipped):
            assert norm == pytest.approx(10.0)
            assert sharded.tolist() == pytest.approx([1.5] * 4)
            assert plain.tolist() == pytest.approx([4.0])


def groups_by_mesh(rank: Rank) -> dict[str, dict[str, tuple[int, ...]]]:
    meshes = {
        "named": init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")),
        "unnamed": init_device_mesh("cpu", (2, 2)),
        "hybrid": init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp_replicate", "dp_shard", "tp")),
        "tp over the wrong ranks": init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)),
        "dp over the wrong ranks": init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",)),
    }
    return {name: dict(mesh_groups(mesh, rank.topology)) for name, mesh in meshes.items()}


def test_the_ranks_of_a_mesh_dim_decide_its_axis_and_its_name_where_they_fit_none() -> None:
    with tpcheck.spawn(Topology(tp=2, dp=2), timeout=120) as world:
        found = world.run(groups_by_mesh)[3]
    right = {"dp": (1, 3), "tp": (2, 3)}
    assert {name: found[name] for name in ("named", "unnamed", "hybrid")} == dict.fromkeys(
        ("named", "unnamed", "hybrid"), right
    )
    assert found["tp over the wrong ranks"] == {"tp": (0, 1, 2, 3)}
    assert found["dp over the wrong ranks"] == {"dp": (0, 1, 2, 3)}


def test_embeddings_that_the_configuration_ties_are_tied_again() -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.config = SimpleNamespace(tie_word_embeddings=tied)
            self.embed, self.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)

        def tie_weights(self) -> None:
            self.head.weight = self.embed.weight

    for tied in (True, False):
        model = Tied(tied)
        restore_tied_embeddings(model)
        assert (model.head.weight is model.embed.weight) == tied


def layouts_over_two_tp_dims(rank: Rank) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("kv", "copies"))
    placements = {"cut": [Shard(0), Shard(0)], "copied": [Shard(0), Replicate()], "replicated": [Replicate()] * 2}
    parameters = {name: distribute_tensor(torch.randn(8, 2), mesh, placement) for name, placement in placements.items()}
    return parameter_layouts(parameters, rank.topology, rank.group("tp"))


def test_a_shard_that_several_tp_ranks_hold_has_no_layout() -> None:
    with tpcheck.spawn(Topology(tp=4), timeout=120) as world:
        found = world.run(layouts_over_two_tp_dims)[0]
    assert set(found) == {"cut", "replicated"}
    assert found["cut"].local_shapes == ((2, 2),) * 4
    assert found["replicated"].is_replicated


def test_a_model_of_no_library_is_not_sent_away_from_the_users_own_plan() -> None:
    assert "Shard it by a function of your own" in hint_to_shard(Model(), "deepspeed", {})
    assert hint_to_shard(Model(), "dtensor", {"plan": PLAN}) == ""
