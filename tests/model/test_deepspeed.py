"""Sharding that DeepSpeed 0.19.8 does right passes; its real bugs are faults of the corpus (tests/lab/faults)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

import tpcheck
from tpcheck import Topology
from tpcheck.backends.deepspeed.backend import DeepSpeedBackend
from tpcheck.backends.interface import TrainingOptions
from tpcheck.numerics.checks import CHECK_NAMES

RIGHT = ("qwen3", "gemma3_text", "opt", "gpt_neox")
CLEAN_MARGIN = 0.2
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}  # where the subject is not the model


def verified(family: str, tp: int = 2, dp: int = 1, **options: Any) -> tpcheck.Report:
    return tpcheck.verify_family(family, topology=Topology(tp=tp, dp=dp), timeout=120, **options)


def assert_clean(report: tpcheck.Report) -> None:
    assert report.passed, report
    assert max(check.worst_margin for check in report.verdict.checks) < CLEAN_MARGIN, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total, report


@pytest.fixture(scope="module")
def llama() -> tpcheck.Report:
    return verified("llama")


def test_a_clean_run_passes_every_check(llama: tpcheck.Report) -> None:
    assert_clean(llama)
    assert {check.check for check in llama.verdict.checks} == set(CHECK_NAMES)
    assert all(check.compared > 0 for check in llama.verdict.checks)


def test_two_runs_give_the_same_numbers(llama: tpcheck.Report) -> None:
    assert verified("llama").verdict.checks == llama.verdict.checks


def test_biases_are_compared_where_a_family_has_them(llama: tpcheck.Report) -> None:
    report = verified("llama", settings={"attention_bias": True, "mlp_bias": True})
    assert_clean(report)
    assert report.verdict.coverage.total > llama.verdict.coverage.total


@pytest.mark.parametrize("family", RIGHT)
def test_a_family_that_is_right_passes(family: str) -> None:
    assert_clean(verified(family))


@pytest.mark.parametrize(
    ("family", "tp", "settings"),
    [
        (
            "llama",
            2,
            {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
        ),  # cut on KV heads: 2 and 1
        ("llama", 4, {"num_key_value_heads": 2}),  # two ranks hold no attention at all
        ("llama", 2, {"vocab_size": 131, "intermediate_size": 97}),
        ("qwen3", 2, {"vocab_size": 131, "tie_word_embeddings": True}),
        ("gpt_neox", 4, {"num_attention_heads": 6, "hidden_size": 48}),
    ],
)
def test_uneven_cuts_and_ties_pass(family: str, tp: int, settings: dict[str, Any]) -> None:
    assert_clean(verified(family, tp=tp, settings=settings))


def test_data_parallelism_alone_passes_and_reports_that_nothing_was_sharded() -> None:
    report = verified("llama", tp=1, dp=2)
    assert report.passed, report
    assert report.verdict.coverage.not_compared["parameters_are_sharded: parameters_are_sharded"].startswith("tp is 1")


@pytest.mark.parametrize(
    "zero_stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_every_zero_stage_passes_over_tp_and_dp(zero_stage: int) -> None:
    assert_clean(verified("qwen2", dp=2, zero_stage=zero_stage, settings=ONE_LAYER))


@pytest.mark.parametrize(("dtype", "zero_stage"), [("float32", 0), ("bfloat16", 1)])
def test_lower_precision_passes(dtype: str, zero_stage: int) -> None:
    report = verified("qwen3", dtype=dtype, zero_stage=zero_stage)
    assert report.passed, report


class OnAnotherAccelerator(DeepSpeedBackend):
    """DeepSpeed on an accelerator that supports other dtypes than this machine's, on every rank."""

    def __init__(self, **supports: bool) -> None:
        self.supports = supports

    @contextmanager
    def session(self, options: TrainingOptions) -> Iterator[None]:
        import deepspeed

        low_precision = {"is_fp16_supported": torch.float16, "is_bf16_supported": torch.bfloat16}
        supported = [torch.float32, *(dtype for name, dtype in low_precision.items() if self.supports[name])]
        accelerator = deepspeed.get_accelerator()
        with (
            patch.multiple(
                accelerator,
                is_fp16_supported=lambda: self.supports["is_fp16_supported"],
                is_bf16_supported=lambda: self.supports["is_bf16_supported"],
                supported_dtypes=lambda: supported,
            ),
            super().session(options),
        ):
            yield


# A CPU supports float16 with AVX512-FP16. DeepSpeed asks for it at stage 3 alone.
@pytest.mark.parametrize(("zero_stage", "fp16"), [(1, True), (3, True), (3, False)])
def test_float64_passes_whether_or_not_the_accelerator_supports_float16(zero_stage: int, fp16: bool) -> None:
    backend = OnAnotherAccelerator(is_fp16_supported=fp16, is_bf16_supported=True)
    assert_clean(verified("qwen2", zero_stage=zero_stage, backend=backend, steps=1, settings=ONE_LAYER))


def test_float64_passes_on_an_accelerator_of_float32_alone() -> None:
    backend = OnAnotherAccelerator(is_fp16_supported=False, is_bf16_supported=False)
    assert_clean(verified("qwen2", zero_stage=3, backend=backend, steps=1, settings=ONE_LAYER))


@pytest.mark.parametrize(("dtype", "fp16"), [("float32", False), ("bfloat16", True)])
def test_zero_3_in_lower_precision_does_not_depend_on_float16(dtype: str, fp16: bool) -> None:
    backend = OnAnotherAccelerator(is_fp16_supported=fp16, is_bf16_supported=True)
    report = verified("qwen3", dtype=dtype, zero_stage=3, backend=backend, steps=1, settings=ONE_LAYER)
    assert report.passed, report


@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_scaled_losses_in_float16_pass_and_overflow_on_both_sides(zero_stage: int) -> None:
    scale = {"fp16": {"initial_scale_power": 17, "hysteresis": 1}}
    report = verified("llama", dtype="float16", zero_stage=zero_stage, config=scale, replays=2)
    assert report.passed, report
    assert any("overflow" in why for why in report.verdict.coverage.not_compared.values())


def test_the_older_entry_passes() -> None:
    assert_clean(verified("llama", backend="deepspeed-tp-model-init"))


def test_the_norm_of_bfloat16_without_zero_is_that_of_one_rank() -> None:
    first, *others = verified("llama", dtype="bfloat16").findings
    assert (first.check, first.cause) == ("gradient_norm_matches_reference", "norm_leaves_out_shards")
    assert {finding.check for finding in others} <= {"updates_match_reference", "optimizer_state_matches_reference"}


def test_a_plan_that_deepspeed_refuses_is_an_error_with_its_message() -> None:
    report = verified("phi3")
    assert report.verdict.verdict == "error"
    assert "unsupported partition style(s): ['rowwise_split_input']" in (report.verdict.message or "")


def test_a_layout_that_deepspeed_cannot_gather_is_missed_coverage_not_a_finding() -> None:
    report = verified("codegen")
    assert report.passed, report
    assert any("cannot gather it" in why for why in report.verdict.coverage.not_compared.values())
