"""The command in a finding repeats it when pasted."""

import shlex

from tpcheck.again import verify_command


def test_defaults_are_left_out_and_the_rest_survives_a_shell() -> None:
    subject = {
        "family": "qwen3", "backend": "deepspeed", "tp": 4, "dp": 2, "zero": 1, "dtype": "bfloat16", "steps": 3,
        "seed": 7,
        "settings": {"tie": True, "name": "it's", "rope.theta": 1e4}, "config": {"a": {"b": None}}, "ignore_plan": True,
    }  # fmt: skip
    command = verify_command(subject)
    assert shlex.split(command) == [
        "tpcheck", "verify", "qwen3", "--tp", "4", "--dp", "2", "--zero", "1", "--dtype", "bfloat16", "--steps", "3",
        "--seed", "7", "--set", "tie=true", "--set", 'name="it\'s"', "--set", "rope.theta=10000.0",
        "--config", '{"a": {"b": null}}', "--ignore-plan",
    ]  # fmt: skip
