"""What transformers shards rightly passes; what is planted in it is found; what it cannot do it says itself."""

from functools import partial
from typing import Any

import pytest

import tpcheck
from tpcheck import Topology, UsageError
from tpcheck.backends.transformers.backend import TransformersBackend

verified = partial(tpcheck.verify_family, backend="transformers", timeout=180)
TP = Topology(tp=2)


@pytest.mark.parametrize(
    ("family", "topology"), [("qwen3", TP), ("mixtral", TP), ("gpt_oss", TP), ("qwen3", Topology(tp=2, dp=2))]
)
def test_a_family_that_is_right_passes(family: str, topology: Topology) -> None:
    report = verified(family, topology=topology)
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total, report


def test_experts_that_lie_on_other_ranks_are_missed_coverage_not_findings() -> None:
    report = verified("mixtral", topology=TP, config={"ep_size": 2})
    assert report.passed, report
    assert any("called less often" in why for why in report.verdict.coverage.not_compared.values())


def test_what_it_saves_is_the_model() -> None:
    report = verified("qwen3", topology=TP, checks=["checkpoint_matches_reference"])
    assert report.passed, report


def test_a_family_without_a_plan_is_an_error_in_its_own_words() -> None:
    report = verified("persimmon", topology=TP)
    assert report.verdict.verdict == "error"
    assert "`PersimmonForCausalLM` has no `tp_plan`" in (report.verdict.message or "")


def test_a_plan_that_leaves_head_norms_partial_is_found() -> None:
    style = {"model.layers.*.self_attn.q_norm": "replicate"}
    first = verified("qwen3", topology=TP, config={"tp_plan": style}).findings[0]
    assert first.check == "gradients_match_reference"
    assert first.where["parameter"].endswith("self_attn.q_norm.weight")


MLA = partial(verified, "minicpm3", topology=TP, settings={"num_hidden_layers": 1}, steps=1)


def test_a_gradient_that_the_style_reduces_behind_the_hook_is_right() -> None:
    report = MLA()
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total, report


def test_the_same_gradient_is_found_where_nothing_reduces_it() -> None:
    style = {"model.layers.*.self_attn.kv_a_proj_with_mqa": "replicate"}
    first = MLA(config={"tp_plan": style}).findings[0]
    assert (first.check, first.cause) == ("gradients_match_reference", "missing_reduce")
    assert first.where["field"].endswith("kv_a_proj_with_mqa")


class ReducesTwice(TransformersBackend):
    """The output of one row-parallel layer is added up over the ranks once more."""

    def shard(self, *args: Any) -> Any:
        candidate = super().shard(*args)
        layer = candidate.module.get_submodule("model.layers.0.self_attn.o_proj")
        once = layer.forward
        layer.forward = lambda hidden: once(hidden) * 2
        return candidate


def test_a_fault_is_found_in_its_module() -> None:
    first = verified("llama", topology=TP, backend=ReducesTwice()).findings[0]
    assert (first.check, first.where["module"]) == ("outputs_match_reference", "model.layers.0.self_attn.o_proj")
    assert first.cause == "duplicate_reduce"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 1}, "zero_stage=1: expected 0: transformers shards over dp with FSDP2"),
        ({"ignore_plan": True}, "ignore_plan=True: expected False"),
        ({"config": {"tp": 2}}, "config='tp': expected one of tp_size"),
        ({"config": {"tp_size": 4}}, "config.tp_size=4: expected 2, as the topology says"),
    ],
)
def test_options_that_it_does_not_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verified("llama", topology=TP, **options)
