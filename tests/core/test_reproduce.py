"""The command in a finding repeats it when pasted."""

import shlex
from typing import Any

import pytest

from tpcheck.core.reproduce import checkpoint_command, verify_command


def test_values_become_flags_by_their_type() -> None:
    options = {
        "tp": 4, "dtype": "bfloat16", "checks": ["replicas_agree", "weights_match_reference"], "ignore_plan": True,
        "compile": False, "batch": None, "config": {"a": {"b": None}},
    }  # fmt: skip
    command = verify_command("qwen3", options)
    assert command is not None
    assert shlex.split(command) == [
        "tpcheck", "verify", "qwen3", "--tp", "4", "--dtype", "bfloat16", "--checks", "replicas_agree",
        "--checks", "weights_match_reference", "--ignore-plan", "--config", '{"a": {"b": null}}',
    ]  # fmt: skip


def test_settings_survive_a_shell() -> None:
    command = verify_command("qwen3", {"settings": {"tie": True, "name": "it's", "rope.theta": 1e4}})
    assert command is not None
    assert shlex.split(command)[3:] == ["--set", "tie=true", "--set", 'name="it\'s"', "--set", "rope.theta=10000.0"]


def test_tuples_and_infinite_numbers_can_be_repeated() -> None:
    command = verify_command("phi", {"settings": {"betas": (0.9, 1.0)}, "config": {"clip": float("inf")}})
    assert command == "tpcheck verify phi --set 'betas=[0.9, 1.0]' --config '{\"clip\": Infinity}'"


CYCLE: dict[str, Any] = {}
CYCLE["again"] = CYCLE


@pytest.mark.parametrize("config", [{"mlp": object()}, {"mlp": {0: 1}}, {"names": {"a"}}, {"path": b"a"}, CYCLE])
def test_a_configuration_that_json_cannot_hold_has_no_command(config: dict[str, Any]) -> None:
    assert verify_command("phi", {"config": config}) is None
    assert verify_command("phi", {"settings": {"value": config}}) is None


def test_a_comparison_of_checkpoints_that_are_no_files_has_no_command() -> None:
    command = checkpoint_command(["a", "b c"], None, ["d"], True)
    assert command == "tpcheck checkpoint a 'b c' --earlier d --allow-pickle"
    assert checkpoint_command(None, None, [], False) is None
    assert checkpoint_command(["a", "b"], None, None, False) is None
