"""Code of the user's own: clean code passes, a fault in it is found where it is, a wrong layout says why."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tpcheck
from tests.backends.hand_made import LAYOUT, Model, shard, shard_without_reduce, tokens
from tpcheck import Topology, UsageError
from tpcheck.backends.custom import CustomBackend
from tpcheck.core.placement import Partial, Replicate, Shard

verified = partial(tpcheck.verify, Model, tokens, topology=Topology(tp=2), timeout=120)


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(tp=2, dp=2)])
def test_code_of_ones_own_passes(topology: Topology) -> None:
    report = verified(topology=topology, shard=shard, layout=LAYOUT)
    assert report.passed, report
    assert report.verdict.subject["backend"] == "custom"


def test_a_layout_may_be_a_function() -> None:
    def layout(name: str, shape: tuple[int, ...]) -> Shard | None:
        return Shard(0) if ".up." in name else Shard(1) if name.endswith("down.weight") else None

    assert verified(shard=shard, layout=layout).passed


def test_a_forgotten_reduction_is_found_in_its_module() -> None:
    first = verified(shard=shard_without_reduce, layout=LAYOUT).findings[0]
    assert (first.check, first.where["module"]) == ("outputs_match_reference", "layers.1.down")


def test_dtensors_need_no_layout() -> None:
    def shard_by_plan(model: nn.Module, rank: Any) -> None:
        mesh = init_device_mesh("cpu", (rank.topology.tp,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()})

    report = verified(shard=shard_by_plan)
    assert report.passed, report


def test_the_norm_of_ones_own_clipping_is_verified() -> None:
    backend = CustomBackend(shard, LAYOUT, clip_gradients=torch.nn.utils.clip_grad_norm_)
    first = verified(backend=backend).findings[0]
    assert (first.check, first.cause) == ("gradient_norm_matches_reference", "norm_is_local")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (None, r"layout\['layers.0.up.weight'\]=Replicate\(\): expected a placement that gives rank [01] its shape"),
        (
            {**LAYOUT, "layers.*.down.weight": Shard(0)},
            r"its shape \(16, 12\) of \(16, 24\) over tp=2; this one gives \(8, 24\)",
        ),
        ({**LAYOUT, "layer.*": Shard(0)}, r"layout='layer.\*': expected a pattern of parameter names, such as embed"),
        ({**LAYOUT, "layers.*.norm.weight": Shard(1)}, r"expected a dim of \(16,\)"),
        ({**LAYOUT, "embed.weight": Partial()}, r"expected tpcheck.core.placement.Shard or Replicate"),
        ({"*": Shard(0, blocks=7)}, r"blocks=7: expected a divisor of"),
    ],
)
def test_a_layout_that_does_not_fit_says_why(layout: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verified(shard=shard, layout=layout)


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
def test_arguments_that_cannot_be_used_say_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verified(**arguments)
