"""Plans of torch's own styles: tensor and sequence parallel, a loss over vocabulary shards, FSDP2 around them."""

from functools import partial
from typing import Any

import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

import tpcheck
from tests.backends.hand_made import Model, tokens
from tpcheck import Topology, UsageError

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
def test_the_models_own_plan_passes(topology: Topology) -> None:
    report = tpcheck.verify_family("qwen3", topology=topology, backend="dtensor", timeout=180)
    assert report.passed, report


def test_what_it_saves_is_the_model() -> None:
    report = verified(topology=Topology(tp=2, dp=2), config={"plan": PLAN}, checks=["checkpoint_matches_reference"])
    assert report.passed, report


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"plan": {"layers.*.up": "packed"}}, r"config.plan\['layers.\*.up'\]='packed': expected one of colwise"),
        ({"plans": {}}, "config='plans': expected one of plan, loss_parallel"),
        ({}, "config.plan=None: expected a dict of styles by module pattern: Model has no plan"),
    ],
)
def test_plans_that_cannot_be_used_say_why(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verified(topology=TP, config=config)
