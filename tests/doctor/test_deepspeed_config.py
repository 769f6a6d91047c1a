"""Each rule reports the configuration that it is about, and no good one."""

from __future__ import annotations

from typing import Any

import pytest

from tpcheck.doctor.deepspeed import KNOWN_KEYS, PRESETS, RULES, config_advice

GOOD = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3},
    "tensor_parallel": {"autotp_size": 2},
}


def rules(config: dict[str, Any]) -> list[str]:
    return [advice.rule for advice in config_advice(config)]


def test_a_good_configuration_has_no_problems() -> None:
    assert rules(GOOD) == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"gradient_cliping": 0.0}, "unknown_keys_are_ignored"),
        ({"tensor_parallel": {}}, "tensor_parallelism_is_off"),
        ({"tensor_parallel": {"autotp_size": 1}}, "tensor_parallelism_is_off"),
        ({"tensor_parallel": None}, "tensor_parallelism_is_off"),
        ({"tensor_parallel": {"autotp_size": 2, "preset_model": "lama"}}, "preset_is_unknown"),
        ({"tensor_parallel": {"autotp_size": 2, "preset_model": "bloom"}}, "preset_of_bloom_has_wrong_slopes"),
        ({"tensor_parallel": {"autotp_size": 2, "preset_model": "phi3"}}, "preset_comes_before_the_model_s_plan"),
        ({"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 4}, "saved_model_is_one_shard"),
        ({"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}, "optimizer_sees_one_shard"),
        ({"optimizer": {"type": "OneBitLamb"}}, "optimizer_sees_one_shard"),
    ],
)
def test_a_rule_reports_its_configuration(change: dict[str, Any], rule: str) -> None:
    assert rules(GOOD | change) == [rule]


@pytest.mark.parametrize(("stage", "is_said"), [(0, False), (1, True), (2, True), (3, False)])
def test_at_zero_1_and_2_configured_for_one_backward_pass_only_the_last_counts(stage: int, is_said: bool) -> None:
    found = rules(GOOD | {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 1})
    assert ("only_the_last_backward_pass_counts" in found) is is_said


@pytest.mark.parametrize(
    ("change", "is_said"),
    [
        ({}, True),
        ({"gradient_clipping": 0.0}, False),
        ({"zero_optimization": {"stage": 1}}, False),
        ({"bf16": {}}, False),
    ],
)
def test_the_norm_of_bfloat16_with_autotp_and_zero_0_is_local(change: dict[str, Any], is_said: bool) -> None:
    config = {"tensor_parallel": {"autotp_size": 2}, "bf16": {"enabled": True}, "gradient_clipping": 1.0}
    assert ("norm_of_bfloat16_is_local" in rules(config | change)) is is_said


def test_clipping_that_is_not_set_is_on() -> None:
    (advice,) = config_advice({key: value for key, value in GOOD.items() if key != "gradient_clipping"})
    assert advice.what == "gradient_clipping is not set: DeepSpeed clips gradients to a norm of 1.0"
    assert advice.fix == 'add "gradient_clipping": 0.0 to disable clipping, or set the intended norm'


def test_an_unknown_key_and_preset_name_their_neighbours() -> None:
    fixes = [advice.fix for advice in config_advice(GOOD | {"zero_optimisation": {}, "qqq": 1})]
    assert fixes == ["did you mean zero_optimization?", None]
    (advice,) = config_advice(GOOD | {"tensor_parallel": {"autotp_size": 2, "preset_model": "qwen"}})
    assert advice.fix == "did you mean qwen2?"


def test_every_rule_is_named_after_its_function() -> None:
    everything = {"x": 1, "tensor_parallel": {"preset_model": "x"}}
    seen = {
        advice.rule
        for advice in (
            *config_advice(everything),
            *config_advice({"tensor_parallel": {"preset_model": "phi3", "autotp_size": 2}}),
            *config_advice({"zero_optimization": {"stage": 1}}),
            *config_advice({"tensor_parallel": {"autotp_size": 2}, "optimizer": {"type": "Muon"}}),
            *config_advice({"tensor_parallel": {"preset_model": "bloom", "autotp_size": 2}, "bf16": {"enabled": True}}),
        )
    }
    assert seen == {rule.__name__ for rule in RULES}


def test_the_default_of_clipping_is_what_deepspeed_says() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    assert GRADIENT_CLIPPING_DEFAULT == 1.0


def test_the_presets_are_those_that_deepspeed_has() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.module_inject.autotp_config import AutoTPPresets

    assert all(AutoTPPresets.get_preset(preset) is not None for preset in PRESETS)
    assert AutoTPPresets.get_preset("lama") is None


def test_known_keys_hold_every_key_of_a_usual_configuration() -> None:
    usual = "train_batch_size fp16 bf16 zero_optimization optimizer scheduler gradient_clipping steps_per_print"
    assert set(usual.split()) <= KNOWN_KEYS
