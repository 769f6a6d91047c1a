"""The user's own sharding code: right code passes, a fault in it is found where it is, a wrong layout is refused."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tpcheck
from tests.backends.hand_made import HIDDEN, LAYOUT, WIDTH, Model, shard, shard_without_reduce, tokens
from tpcheck import Topology, UsageError
from tpcheck.backends.custom import CustomBackend, layouts_by_pattern
from tpcheck.core.placement import Partial, Placement, Replicate, Shard

verified = partial(tpcheck.verify, Model, tokens, topology=Topology(tp=2), timeout=120)


def rank(tp_rank: int, tp: int = 2) -> Any:
    return SimpleNamespace(topology=Topology(tp=tp), rank=tp_rank)


def layouts(source: Any, shapes: dict[str, tuple[int, ...]], local: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the layouts on TP rank 1 of parameters with these full and local shapes."""
    return layouts_by_pattern(source, {name: torch.zeros(shape) for name, shape in local.items()}, shapes, rank(1))


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(tp=2, dp=2)])
def test_right_code_passes(topology: Topology) -> None:
    report = verified(topology=topology, shard=shard, layout=LAYOUT)
    assert report.passed, report
    assert report.verdict.subject["backend"] == "custom"


def test_a_forgotten_reduction_is_found_in_its_module() -> None:
    first = verified(shard=shard_without_reduce, layout=LAYOUT).findings[0]
    assert (first.check, first.where["module"]) == ("outputs_match_reference", "layers.1.down")


def test_dtensors_need_no_layout() -> None:
    def shard_by_plan(model: nn.Module, rank: Any) -> None:
        mesh = init_device_mesh("cpu", (rank.topology.tp,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()})

    report = verified(shard=shard_by_plan)
    assert report.passed, report


def test_the_norm_of_the_users_clipping_is_verified() -> None:
    backend = CustomBackend(shard, LAYOUT, clip_gradients=torch.nn.utils.clip_grad_norm_)
    first = verified(backend=backend).findings[0]
    assert (first.check, first.cause) == ("gradient_norm_matches_reference", "norm_is_local")


def clip_without_epsilon(parameters: list[torch.Tensor], max_norm: float, *, epsilon: float = 0.0) -> float:
    """Clip by the norm over the two ranks: of the parameters only the up and down projections are cut."""
    squares = torch.stack([parameter.grad.square().sum() for parameter in parameters])  # type: ignore[union-attr]
    is_sharded = torch.tensor([parameter.shape in SHARDS for parameter in parameters])
    total = squares[is_sharded].sum()
    dist.all_reduce(total)
    norm = float((total + squares[~is_sharded].sum()).sqrt())
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, max_norm / (norm + epsilon)))  # type: ignore[union-attr]
    return norm


SHARDS = {(HIDDEN // 2, WIDTH), (HIDDEN // 2,), (WIDTH, HIDDEN // 2)}


def test_clipping_of_ones_own_need_not_add_what_torch_adds_to_the_norm() -> None:
    report = verified(backend=CustomBackend(shard, LAYOUT, clip_gradients=clip_without_epsilon))
    assert report.passed, report


def test_an_epsilon_that_changes_the_step_is_found() -> None:
    clip = partial(clip_without_epsilon, epsilon=0.1)
    report = verified(backend=CustomBackend(shard, LAYOUT, clip_gradients=clip))
    first = report.findings[0]
    assert (first.check, first.cause, first.evidence["epsilon"]) == (
        "updates_match_reference",
        "clip_epsilon_differs",
        pytest.approx(0.1),
    )
    assert {finding.check for finding in report.findings} <= {first.check, "optimizer_state_matches_reference"}


def test_a_wrong_layout_is_reported_from_the_ranks() -> None:
    with pytest.raises(UsageError, match=r"layout\['layers.0.up.weight'\]=Replicate\(\): expected a placement under"):
        verified(shard=shard, layout=None)


@pytest.mark.parametrize(
    ("placement", "shape", "local"),
    [
        (Shard(0), (6, 4), (3, 4)),
        (Shard(-1), (6, 4), (6, 2)),
        (Shard(0, blocks=3), (12, 4), (6, 4)),
        (Shard(0, sizes=((4, 2),)), (6, 4), (2, 4)),
        (Replicate(), (6, 4), (6, 4)),
    ],
)
def test_a_placement_applies_to_every_name_that_its_pattern_matches(
    placement: Placement, shape: tuple[int, ...], local: tuple[int, ...]
) -> None:
    found = layouts(
        {"layers.*.up": placement}, {"layers.0.up": shape, "norm": (4,)}, {"layers.0.up": local, "norm": (4,)}
    )
    assert found["layers.0.up"].local_shapes[1] == local
    assert found["norm"].is_replicated


def test_the_first_pattern_that_matches_decides() -> None:
    assert not layouts({"a*": Shard(0), "*": Replicate()}, {"ab": (4,)}, {"ab": (2,)})["ab"].is_replicated


def test_a_function_may_give_the_placements() -> None:
    def placement(name: str, shape: tuple[int, ...]) -> Shard | None:
        return Shard(0) if len(shape) == 2 else None

    found = layouts(placement, {"matrix": (4, 4), "vector": (4,)}, {"matrix": (2, 4), "vector": (4,)})
    assert [found[name].is_replicated for name in ("matrix", "vector")] == [False, True]


def test_a_parameter_that_the_unsharded_model_lacks_has_no_layout() -> None:
    assert layouts(None, {}, {"adapter": (4,)}) == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"layout\['up'\]=Replicate\(\): expected a placement under which rank 1 holds shape \(2, 4\)"),
        ({"up": Shard(1)}, r"shape \(2, 4\) \(full shape \(4, 4\), tp=2\); yours gives \(4, 2\)"),
        ({"up": Shard(0), "upp": Shard(0)}, r"layout='upp': expected a pattern of parameter names, such as up"),
        ({"up": Shard(2)}, r"expected a dim of \(4, 4\)"),
        ({"up": Partial()}, r"expected tpcheck.placement.Shard or tpcheck.placement.Replicate"),
        ({"up": Shard(0, blocks=7)}, r"blocks=7: expected a divisor of 4"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layouts(source, {"up": (4, 4)}, {"up": (2, 4)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": LAYOUT}, r"shard=None: expected a callable \(model, rank\)"),
        ({"shard": shard, "layout": Replicate()}, "layout=.*: expected a dict of placements"),
        ({"backend": "custom"}, r"shard=None: expected a callable \(model, rank\)"),
        ({"shard": shard, "zero_stage": 1}, "zero_stage=1: expected 0"),
        ({"shard": lambda model, rank: "no module"}, "shard='str': expected a callable that returns"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verified(**arguments)
