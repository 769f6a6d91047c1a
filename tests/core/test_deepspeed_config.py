"""What a DeepSpeed configuration of the user's says of a run."""

from __future__ import annotations

from tpcheck.core.deepspeed_config import implied_options, left_out, resolve_auto


def test_what_the_mathematics_depends_on_stays() -> None:
    config = {
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2, "offload_param": {"device": "nvme"}, "reduce_scatter": True},
        "aio": {"block_size": 1},
        "train_batch_size": 512,
    }
    kept, notes = left_out(config)
    assert kept == {
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2, "reduce_scatter": True},
    }
    assert [note.rpartition(": ")[2] for note in notes] == ["aio, zero_optimization.offload_param", "train_batch_size"]


def test_keys_that_deepspeed_ignores_are_said_and_stay() -> None:
    kept, notes = left_out({"gradient_cliping": 0.5, "bf16": {"enabled": True}, "_why": "tuned"})
    assert kept == {"gradient_cliping": 0.5, "bf16": {"enabled": True}, "_why": "tuned"}
    [note] = notes
    assert note.endswith(": gradient_cliping (did you mean gradient_clipping?), _why")


def test_options_that_a_configuration_sets() -> None:
    config = {
        "tensor_parallel": {"autotp_size": 8},
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "gradient_accumulation_steps": 4,
    }
    assert {name: value for name, (_, value) in implied_options(config).items()} == {
        "tp": 8,
        "zero": 3,
        "dtype": "bfloat16",
        "accumulate": 4,
    }
    assert implied_options({"fp16": {"enabled": True}}) == {"dtype": ("fp16.enabled", "float16")}
    auto = {"gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"}, "tensor_parallel": {"autotp_size": 0}}
    assert implied_options(auto) == {}


def test_auto_without_a_value_is_left_to_deepspeed() -> None:
    config = {"a": "auto", "b": {"c": "auto", "d": 1}}
    assert resolve_auto(config, {"b.c": "auto"}) == {"b": {"c": "auto", "d": 1}}  # its value follows later
    assert resolve_auto(config, {"b.c": 2}) == {"b": {"c": 2, "d": 1}}
