"""The command in a finding repeats it when pasted."""

import shlex
from typing import Any

import pytest

from tpcheck.core.reproduce import verify_command


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


def test_tuples_and_numbers_that_are_not_finite_survive_too() -> None:
    command = verify_command({"family": "phi", "settings": {"betas": (0.9, 1.0)}, "config": {"clip": float("inf")}})
    assert command == "tpcheck verify phi --set 'betas=[0.9, 1.0]' --config '{\"clip\": Infinity}'"


CYCLE: dict[str, Any] = {}
CYCLE["again"] = CYCLE


@pytest.mark.parametrize("config", [{"mlp": object()}, {"mlp": {0: 1}}, {"names": {"a"}}, {"path": b"a"}, CYCLE])
def test_a_configuration_that_json_cannot_hold_has_no_command(config: dict[str, Any]) -> None:
    assert verify_command({"family": "phi", "config": config}) is None
    assert verify_command({"family": "phi", "settings": {"value": config}}) is None
