"""The part of a DTensor on this rank: shards as they are, sums reduced, FSDP2 over TP in the right order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tpcheck import Rank, Topology, World, spawn
from tpcheck.backends.local_part import full_tensor, local_part

FULL = torch.arange(30.0).reshape(5, 6)  # five rows: neither two TP ranks nor two DP ranks cut them evenly


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with spawn(Topology(tp=2, dp=2), timeout=120) as world:
        yield world


def mesh_of(rank: Rank) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def test_a_plain_tensor_is_returned_as_it_is() -> None:
    assert local_part(FULL) is FULL
    assert full_tensor(FULL) is FULL


def shared_memory(rank: Rank) -> bool:
    from torch.distributed.tensor import Shard, distribute_tensor

    sharded = distribute_tensor(FULL, mesh_of(rank)["tp"], [Shard(0)])
    return local_part(sharded).data_ptr() == sharded.to_local().data_ptr()


def test_a_shard_shares_the_memory_of_its_dtensor(world: World) -> None:
    assert all(world.run(shared_memory))


def partial_parts(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the local parts of a sum over TP: replicated over DP, and sharded by rows over DP."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, place = mesh_of(rank), rank.topology.coordinate(rank.rank)
    term = FULL * (1 + place["tp"])
    replicated = DTensor.from_local(term, mesh, [Replicate(), Partial()], run_check=False)
    rows = term[:3] if place["dp"] == 0 else term[3:]
    sharded = DTensor.from_local(rows, mesh, [Shard(0), Partial()], run_check=False, shape=(5, 6), stride=(6, 1))
    return local_part(replicated), local_part(sharded)


def test_a_sum_is_reduced_and_other_dims_keep_their_shards(world: World) -> None:
    for rank, (replicated, sharded) in enumerate(world.run(partial_parts)):
        assert torch.equal(replicated, 3 * FULL)
        assert torch.equal(sharded, 3 * (FULL[:3] if rank < 2 else FULL[3:]))


def fsdp_over_tp(rank: Rank) -> dict[str, Any]:
    """Return the TP shards of weights with five rows or six columns that FSDP2 shards over DP as well."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from tpcheck.backends.dtensor.candidate import parameter_layouts, tp_shard

    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 6, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(FULL)
        model[1].weight.copy_(FULL.t())
    mesh = mesh_of(rank)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()}, src_data_rank=None)
    fully_shard(model, mesh=mesh["dp"])
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    return {
        "placements": {name: repr(parameter.placements) for name, parameter in parameters.items()},
        "shards": {name: tp_shard(parameter, parameter, rank.topology) for name, parameter in parameters.items()},
        "layouts": parameter_layouts(parameters, rank.topology, rank.group("tp")),
    }


def test_fsdp_over_an_uneven_tp_cut_gathers_each_tp_shard_in_order(world: World) -> None:
    ranks = world.run(fsdp_over_tp)
    assert "_StridedShard" in ranks[0]["placements"]["0.weight"]
    for rank, found in enumerate(ranks):
        rows = slice(0, 3) if rank % 2 == 0 else slice(3, 5)
        assert torch.equal(found["shards"]["0.weight"], FULL[rows])
        assert torch.equal(found["shards"]["1.weight"], FULL.t()[:, rows])


def test_layouts_of_fsdp_over_tp_assemble_the_full_parameter(world: World) -> None:
    ranks = world.run(fsdp_over_tp)[:2]  # one TP group
    for name, full in (("0.weight", FULL), ("1.weight", FULL.t())):
        layout = ranks[0]["layouts"][name]
        assert torch.equal(layout.assemble([found["shards"][name] for found in ranks]), full)


def partial_parameter(rank: Rank) -> tuple[Any, torch.Tensor]:
    from torch.distributed.tensor import DTensor, Partial

    from tpcheck.backends.dtensor.candidate import parameter_layouts, tp_shard

    parameter = DTensor.from_local(FULL, mesh_of(rank)["tp"], [Partial()], run_check=False)
    found = parameter_layouts({"weight": parameter}, rank.topology, rank.group("tp"))
    return found["weight"], tp_shard(parameter, parameter, rank.topology)


def test_a_parameter_that_is_a_sum_counts_as_replicated_with_its_sum(world: World) -> None:
    for layout, shard in world.run(partial_parameter):
        assert layout.is_replicated
        assert torch.equal(shard, 2 * FULL)


def gradient_of_other_placements(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the TP shards of gradients that are a sum, and replicated, where the parameter is sharded by rows."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    from tpcheck.backends.dtensor.candidate import tp_shard

    mesh = mesh_of(rank)["tp"]
    parameter = distribute_tensor(FULL, mesh, [Shard(0)])
    terms = DTensor.from_local(FULL, mesh, [Partial()], run_check=False)
    replicated = DTensor.from_local(FULL, mesh, [Replicate()], run_check=False)
    return tuple(tp_shard(gradient, parameter, rank.topology) for gradient in (terms, replicated))  # type: ignore[return-value]


def test_a_gradient_takes_the_placements_of_its_parameter(world: World) -> None:
    for rank, (from_sum, from_replica) in enumerate(world.run(gradient_of_other_placements)):
        rows = FULL[:3] if rank % 2 == 0 else FULL[3:]
        assert torch.equal(from_sum, 2 * rows)
        assert torch.equal(from_replica, rows)
