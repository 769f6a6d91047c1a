"""The transformers backend: right families pass, injected faults are found, unsupported families are errors."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

import tpcheck
from tpcheck import Rank, Topology, UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.transformers.backend import (
    BEFORE_TP_SIZE,
    TransformersBackend,
    copy_unsaved_settings,
    distributed_config,
    layout_of,
    resolved_before_tp_size,
    save_and_load,
    sync_replicated_parameters,
)

verified = partial(tpcheck.verify_family, backend="transformers", timeout=180)
TP = Topology(tp=2)


@pytest.mark.parametrize(
    ("family", "topology"),
    [
        pytest.param("qwen3", TP, marks=pytest.mark.slow),
        pytest.param("mixtral", TP, marks=pytest.mark.slow),
        ("gpt_oss", TP),
        ("qwen3", Topology(tp=2, dp=2)),
    ],
)
def test_a_family_that_transformers_shards_correctly_passes(family: str, topology: Topology) -> None:
    report = verified(family, topology=topology)
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total, report


@pytest.mark.tpcheck(tp=2)
def test_a_model_without_plain_parameters_has_none_to_synchronise(tp_rank: Rank) -> None:
    sync_replicated_parameters(nn.Linear(2, 2).requires_grad_(False))  # as where FSDP shards all of them


def test_experts_on_other_ranks_are_missed_coverage_and_not_findings() -> None:
    report = verified("mixtral", topology=TP, config={"ep_size": 2})
    assert report.passed, report
    assert any("called less often" in why for why in report.verdict.coverage.not_compared.values())


def test_both_ways_to_save_write_the_model() -> None:
    report = verified("qwen3", topology=TP, checks=["checkpoint_matches_reference"])
    assert report.passed, report


def test_a_family_without_a_plan_is_an_error_with_the_message_of_transformers() -> None:
    report = verified("persimmon", topology=TP)
    assert report.verdict.verdict == "error"
    assert "`PersimmonForCausalLM` has no `tp_plan`" in (report.verdict.message or "")


def test_a_plan_that_leaves_the_gradients_of_head_norms_partial_is_found() -> None:
    style = {"model.layers.*.self_attn.q_norm": "replicate"}
    first = verified("qwen3", topology=TP, config={"tp_plan": style}).findings[0]
    assert first.check == "gradients_match_reference"
    assert first.where["parameter"].endswith("self_attn.q_norm.weight")


MLA = partial(verified, "minicpm3", topology=TP, settings={"num_hidden_layers": 1}, steps=1)


def test_a_gradient_that_the_style_reduces_after_the_hook_passes() -> None:
    report = MLA()
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total, report


def test_the_same_gradient_is_found_if_nothing_reduces_it() -> None:
    style = {"model.layers.*.self_attn.kv_a_proj_with_mqa": "replicate"}
    first = MLA(config={"tp_plan": style}).findings[0]
    assert (first.check, first.cause) == ("gradients_match_reference", "missing_reduce")
    assert first.where["field"].endswith("kv_a_proj_with_mqa")


class ReducesTwice(TransformersBackend):
    """Doubles the output of one row-parallel layer, as a second reduction over two ranks does."""

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
        ({"config": {"tp": 2}}, "config='tp': expected one of tp_"),
    ],
)
def test_options_that_transformers_lacks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TransformersBackend().resolved(TrainingOptions(dtype=torch.float64, **options))


@pytest.mark.skipif(BEFORE_TP_SIZE, reason="DistributedConfig has no tp_size")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tp_size": 4}, "config.tp_size=4: expected 2, as the topology requires"),
        ({"dp_replicate_size": 3}, "config.dp_replicate_size=3: expected a divisor of dp=4"),
        ({"fsdp_size": 4, "dp_replicate_size": 2}, "config.fsdp_size=4: expected 2"),
    ],
)
def test_sizes_that_contradict_the_topology_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        distributed_config(config, Topology(tp=2, dp=4))


@pytest.mark.skipif(BEFORE_TP_SIZE, reason="DistributedConfig has no tp_size")
def test_the_sizes_of_the_axes_follow_from_the_topology() -> None:
    config = distributed_config({"dp_replicate_size": 2}, Topology(tp=2, dp=4))
    assert (config.tp_size, config.fsdp_size, config.dp_replicate_size) == (2, 2, 2)


def test_settings_that_files_do_not_carry_are_copied() -> None:
    model, loaded = (nn.Sequential(nn.Dropout(p), nn.Linear(2, 2), nn.Linear(2, 2)) for p in (0.0, 0.1))
    model[1].weight.requires_grad_(False)
    copy_unsaved_settings(model.eval(), loaded.train())
    assert not loaded.training
    assert loaded[0].p == 0.0
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [False, True, True, True]


def test_a_model_of_another_library_is_refused() -> None:
    with pytest.raises(UsageError, match=r"build='Linear': expected a transformers\.PreTrainedModel"):
        save_and_load(nn.Linear(1, 1), torch.float32)


class FailsOnRankZeroFirst(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A model whose loading fails on every rank, on rank 0 before the others have read a file."""

    @classmethod
    def from_pretrained(cls, path: str, **how: Any) -> Any:
        if dist.get_rank():
            time.sleep(0.2)
            assert Path(path, "config.json").is_file()
        raise NotImplementedError("no such plan")


@pytest.mark.tpcheck(tp=2)
def test_files_stay_until_every_rank_has_read_them_also_after_an_error(tp_rank: Rank) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = FailsOnRankZeroFirst(transformers.LlamaConfig(vocab_size=8, **sizes))
    with pytest.raises(NotImplementedError):
        save_and_load(model, torch.float32)


def test_older_versions_take_a_plan_and_do_not_clip() -> None:
    options = TrainingOptions(dtype=torch.float32, config={"tp_plan": "auto"})
    assert resolved_before_tp_size(options).max_grad_norm == 0.0
    with pytest.raises(UsageError, match="config='ep_size': expected one of tp_plan"):
        resolved_before_tp_size(TrainingOptions(dtype=torch.float32, config={"ep_size": 2}))


def test_older_versions_read_layouts_from_positions() -> None:
    shards = [torch.tensor([[0, 1], [4, 5]]), torch.tensor([[2, 3], [6, 7]])]
    layout = layout_of((4, 2), shards)
    assert layout.assemble(shards).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout_of((2, 2), shards).is_replicated


def test_the_forkserver_compiles_the_patterns_of_names_once() -> None:
    program = (
        "from transformers import conversion_mapping as mapping\n"
        "before = mapping._checkpoint_conversion_mapping_cache\n"
        "import tpcheck.backends.transformers.preload\n"
        "print(before is None, bool(mapping._checkpoint_conversion_mapping_cache))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
