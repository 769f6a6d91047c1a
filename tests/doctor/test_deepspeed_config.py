"""Each rule reports the configuration that it is about, and no good one."""

from __future__ import annotations

from typing import Any

import pytest

from tpcheck.core.deepspeed_config import KNOWN_KEYS
from tpcheck.doctor.deepspeed import PRESETS, RULES, config_advice
from tpcheck.lab.known import register

GOOD = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 1},
    "tensor_parallel": {"autotp_size": 2},
    "gradient_accumulation_steps": 2,
}
SAVING = "saved_model_is_one_shard"  # of every configuration with tensor parallelism below ZeRO 3


def rules(config: dict[str, Any]) -> list[str]:
    return [advice.rule for advice in config_advice(config)]


def test_a_good_configuration_has_no_problem_but_that_of_saving() -> None:
    assert rules(GOOD) == [SAVING]
    (of_zero_3,) = config_advice(GOOD | {"zero_optimization": {"stage": 3}})
    assert (of_zero_3.rule, of_zero_3.severity) == ("zero_3_needs_a_part_on_every_rank", "advice")


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
        ({"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}, "optimizer_sees_one_shard"),
        ({"optimizer": {"type": "OneBitLamb"}}, "optimizer_sees_one_shard"),
    ],
)
def test_a_rule_reports_its_configuration(change: dict[str, Any], rule: str) -> None:
    assert [found for found in rules(GOOD | change) if found != SAVING] == [rule]


def of_run(stage: int, **config: Any) -> dict[str, Any]:
    return {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": stage}, **config}


MUON = {"optimizer": {"type": "Muon"}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True}}
CONFIGURATION_OF_BUG = {
    "deepspeed-bf16-norm": (of_run(0, bf16={"enabled": True}), "norm_of_bfloat16_is_local"),
    "deepspeed-bloom-preset-alibi": (
        {"tensor_parallel": {"autotp_size": 2, "preset_model": "bloom"}},
        "preset_of_bloom_has_wrong_slopes",
    ),
    "deepspeed-fp16-growing-scale": (of_run(2, gradient_clipping=0, **FP16), "growing_scale_shortens_a_step"),
    "deepspeed-fp16-loss-not-scaled": (of_run(0, **FP16), "losses_of_float16_are_not_scaled"),
    "deepspeed-muon-drops-gradients": (of_run(2, **MUON), "muon_drops_gradients"),
    "deepspeed-overlap-empty-shard": (
        {"tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True}},
        "overlap_needs_contiguous_gradients",
    ),
    "deepspeed-save-16bit-model": (of_run(1), "saved_model_is_one_shard"),
    "deepspeed-trainer-logged-rate": ({"scheduler": {"type": "WarmupLR"}}, "logged_rate_is_that_of_the_next_step"),
    "deepspeed-zero3-empty-shard": (of_run(3), "zero_3_needs_a_part_on_every_rank"),
}
OF_A_MODEL_OR_PROGRAM = {
    "deepspeed-codegen-blocks": "a limit of one model type",
    "deepspeed-drops-adapters": "of adapters, which a program makes",
    "deepspeed-drops-adapters-of-zero": "of adapters, which a program makes",
    "deepspeed-t5-norm": "of one model type",
    "deepspeed-trainer-drops-optimizers": "of an argument of the Trainer's, with any configuration",
    "deepspeed-zero3-experts": "of one model type",
}


def test_every_entry_of_the_register_that_a_configuration_meets_has_a_rule() -> None:
    of_options = {bug.name for bug in register() if bug.backend == "deepspeed" and (bug.only or bug.config)}
    assert of_options == CONFIGURATION_OF_BUG.keys() | OF_A_MODEL_OR_PROGRAM.keys()


@pytest.mark.parametrize("bug", CONFIGURATION_OF_BUG)
def test_a_configuration_that_meets_a_known_bug_is_told_so(bug: str) -> None:
    config, rule = CONFIGURATION_OF_BUG[bug]
    assert rule in rules(config)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (of_run(1, **FP16), "losses_of_float16_are_not_scaled"),
        (of_run(0, fp16={"enabled": False}), "losses_of_float16_are_not_scaled"),
        (of_run(0, fp16={"enabled": True, "loss_scale": 1}), "losses_of_float16_are_not_scaled"),
        (of_run(0, gradient_clipping=0, **FP16), "growing_scale_shortens_a_step"),
        (of_run(2, gradient_clipping=1.0, **FP16), "growing_scale_shortens_a_step"),
        (of_run(2, **FP16), "growing_scale_shortens_a_step"),  # clips, by default
        (of_run(2, gradient_clipping=0, fp16={"enabled": True, "loss_scale": 128}), "growing_scale_shortens_a_step"),
        (of_run(1, **MUON), "muon_drops_gradients"),
        (of_run(2, optimizer=MUON["optimizer"]), "muon_drops_gradients"),
        (of_run(2, **{**MUON, "optimizer": {"type": "AdamW"}}), "muon_drops_gradients"),
        (of_run(0, scheduler={}), "logged_rate_is_that_of_the_next_step"),
        ({"tensor_parallel": {"tp_overlap_comm": True}}, "overlap_needs_contiguous_gradients"),
        ({"zero_optimization": {"stage": 3}}, "zero_3_needs_a_part_on_every_rank"),
    ],
)
def test_a_rule_is_silent_where_the_bug_does_not_show(config: dict[str, Any], rule: str) -> None:
    assert rule not in rules(config)


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
    unset = config_advice({key: value for key, value in GOOD.items() if key != "gradient_clipping"})
    (advice,) = (each for each in unset if each.rule != SAVING)
    assert advice.what == "gradient_clipping is not set: DeepSpeed clips gradients to a norm of 1.0"
    assert advice.fix == 'add "gradient_clipping": 0.0 to disable clipping, or set the intended norm'


def test_an_unknown_key_and_preset_name_their_neighbours() -> None:
    unknown = config_advice(GOOD | {"zero_optimisation": {}, "qqq": 1})
    assert [advice.fix for advice in unknown if advice.rule != SAVING] == ["did you mean zero_optimization?", None]
    preset = config_advice(GOOD | {"tensor_parallel": {"autotp_size": 2, "preset_model": "qwen"}})
    (advice,) = (each for each in preset if each.rule != SAVING)
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
            *(advice for config, _ in CONFIGURATION_OF_BUG.values() for advice in config_advice(config)),
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
