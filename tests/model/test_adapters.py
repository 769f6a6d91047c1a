"""Models with adapters: what a library drops is found, and what it shards trains as the unsharded model does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tpcheck import Topology, UsageError, verify, verify_family
from tpcheck.backends.peft_models import plan_around_adapters
from tpcheck.families.adapters import with_adapters
from tpcheck.families.build import small_model
from tpcheck.model.candidate import lost_parameters

CHANCE = torch.Generator().manual_seed(0)
WEIGHT, DOWN, UP = (torch.randn(*shape, generator=CHANCE) for shape in ((8, 6), (2, 6), (8, 2)))
SMALL: dict[str, Any] = {"settings": {"num_hidden_layers": 1}, "replays": 2}
EXPECTED = {"layer.base.weight": WEIGHT, "layer.down.weight": DOWN, "layer.up.weight": UP}


@dataclass
class Holding:
    """A candidate that holds parameters under new names."""

    parameters: dict[str, torch.Tensor]

    def parameter(self, name: str) -> torch.Tensor:
        return self.parameters[name]


def lost(held: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = EXPECTED) -> tuple[str, ...]:
    candidate: Any = Holding(held)
    return lost_parameters(candidate, held, expected, 2)


@pytest.mark.parametrize(
    "held",
    [
        EXPECTED,
        {f"module.{name}": value for name, value in EXPECTED.items()},
        {"layer.fused": torch.cat([DOWN, WEIGHT[:4]]), "layer.up.weight": UP},
        {"layer.weight": WEIGHT[:, 3:], "layer.down.weight": DOWN, "layer.up.weight": UP},
        {"layer.weight": WEIGHT.t(), "layer.down.weight": DOWN, "layer.up.weight": UP},
    ],
    ids=["the same", "wrapped", "a shard, fused with another", "a cut along the other dim", "transposed"],
)
def test_what_the_model_holds_under_another_name_is_not_lost(held: dict[str, torch.Tensor]) -> None:
    assert lost(held) == ()


def test_what_it_holds_under_no_name_is_lost() -> None:
    assert lost({"layer.weight": WEIGHT[:4]}) == ("layer.down.weight", "layer.up.weight")
    assert lost({}) == tuple(EXPECTED)


def test_bfloat16_values_that_recur_by_chance_do_not_stand_for_a_lost_parameter() -> None:
    drawn = {name: torch.randn(16, 64, generator=CHANCE).to(torch.bfloat16) for name in ("a", "b")}
    assert lost({"c": drawn["a"]}, drawn) == ("b",)


def adapted_llama() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"], use_rslora=True)
    model: nn.Module = get_peft_model(small_model("llama"), config)
    return model


def test_adapters_that_deepspeed_drops_are_found() -> None:
    report = verify_family("llama", topology=Topology(tp=2), lora=4)
    (finding,) = report.findings
    assert (finding.check, finding.cause) == ("parameters_are_sharded", "tensor_missing")
    names = [finding.where["parameter"], *finding.evidence["also"]]
    assert len(names) == 2 * 7 * 2  # A and B of all linear layers
    assert all(".lora_" in name for name in names)


def test_adapters_that_deepspeed_drops_are_named_where_zero_fails_on_them() -> None:
    report = verify_family("llama", topology=Topology(tp=2), zero_stage=1, lora="4,q_proj,v_proj", steps=1)
    message = report.verdict.message or ""
    assert report.verdict.verdict == "error"
    assert "AutoTP has replaced the layers of 8 trained parameters" in message
    assert "layers.0.self_attn.q_proj.lora_A.default.weight is the first" in message


def test_adapters_on_a_model_that_transformers_shards_pass() -> None:
    checks = ["outputs_match_reference", "gradients_match_reference", "checkpoint_matches_reference"]
    report = verify(adapted_llama, topology=Topology(tp=2), backend="transformers", checks=checks)
    report.raise_if_failed()
    coverage = report.verdict.coverage
    assert coverage.compared > 400
    assert set(coverage.not_compared.values()) == {"actual holds the adapter alone"}


@pytest.mark.parametrize("lora", [-1, True, "4,", "attention", "4,attention,q_proj", {"r": 0}, {"r": 2, "ranks": 3}])
def test_adapters_of_another_form_are_an_error_of_usage(lora: Any) -> None:
    with pytest.raises(UsageError, match="lora"):
        with_adapters("llama", {}, lora)


@pytest.mark.parametrize(
    ("lora", "count"),
    [(2, 7), ("2,attention", 4), ("2,q_proj,lm_head,rslora", 1.5), ({"target_modules": "attention"}, 4)],
)
def test_adapters_are_on_the_layers_that_are_named(lora: Any, count: float) -> None:
    model = with_adapters("llama", {}, lora)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == count * 2  # layers


def test_a_plan_is_cut_around_adapters() -> None:
    model = with_adapters("llama", {"num_hidden_layers": 1}, "2,q_proj,down_proj")
    plan = {
        "model.layers.*.self_attn.*_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "lm_head": "colwise",
    }
    attention, mlp = (f"base_model.model.model.layers.0.{part}." for part in ("self_attn", "mlp"))
    assert plan_around_adapters(model, plan) == {
        f"{attention}q_proj.base_layer": "colwise",
        f"{attention}q_proj.lora_B.default": "colwise",
        **{f"{attention}{name}_proj": "colwise" for name in "kvo"},
        f"{mlp}down_proj.base_layer": "rowwise",
        f"{mlp}down_proj.lora_A.default": "rowwise",
        "base_model.model.lm_head": "colwise",
    }


def test_adapters_on_all_linear_layers_train_under_a_plan_of_torch_and_are_saved() -> None:
    checks = ["gradients_match_reference", "checkpoint_matches_reference", "resume_matches_uninterrupted"]
    report = verify_family("llama", topology=Topology(tp=2), backend="dtensor", lora=4, checks=checks, steps=1, **SMALL)
    report.raise_if_failed()
    reasons = list(report.verdict.coverage.not_compared.values())
    assert len([reason for reason in reasons if "RuntimeError" in reason]) == 2  # peft's save, at both moments
    assert len([reason for reason in reasons if "loading leaves it as it is" in reason]) == len(reasons) - 2
