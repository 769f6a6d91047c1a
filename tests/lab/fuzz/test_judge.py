"""The outcome of a trial, on hand-made tensors of two ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tpcheck.lab.fuzz.judge import crashed_trial, in_general, judged_trial
from tpcheck.lab.fuzz.layer_trial import RankTrial, TriedTensor
from tpcheck.lab.fuzz.results import INPUT_GRADIENT, OUTPUT, Outcome, Trial

WHOLE = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)
TERM = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass
class Options:
    backend_name: str = "deepspeed"
    known: bool = False


def outcome(name: str, actual: list[torch.Tensor], positions: tuple[list[int], list[int]] = ([0], [1])) -> Outcome:
    ranks = [
        RankTrial({name: TriedTensor(tensor, WHOLE, 1e-12)}, {"weight": torch.tensor(held)})
        for tensor, held in zip(actual, positions, strict=True)
    ]
    return judged_trial(Trial("Layer"), ranks, Options(), {}, "command")


def test_tensors_within_the_allowed_error_pass() -> None:
    assert outcome(OUTPUT, [WHOLE, WHOLE + 1e-14]).status == "passed"


def test_ranks_that_hold_the_same_part_are_refused() -> None:
    assert outcome(OUTPUT, [WHOLE, WHOLE], ([0, 1], [1, 2])).status == "refused"


@pytest.mark.parametrize(
    ("name", "actual", "ranks", "cause"),
    [
        (OUTPUT, [TERM, WHOLE - TERM], [0, 1], "missing_reduce"),
        (OUTPUT, [2 * WHOLE, 2 * WHOLE], [0, 1], "duplicate_reduce"),
        (INPUT_GRADIENT, [TERM, WHOLE - TERM], [0, 1], "missing_reduce"),
        (INPUT_GRADIENT, [2 * WHOLE, 2 * WHOLE], [0, 1], "duplicate_reduce"),
        (OUTPUT, [WHOLE, WHOLE + TERM], [1], None),
        (OUTPUT, [WHOLE, WHOLE[:2]], [1], None),
    ],
)
def test_a_wrong_tensor_has_its_ranks_and_its_cause(
    name: str, actual: list[torch.Tensor], ranks: list[int], cause: str | None
) -> None:
    failed = outcome(name, actual)
    assert (failed.status, failed.kind, failed.command) == ("failed", f"Layer {name}", "command")
    assert (failed.data["tensor"], failed.data["ranks"], failed.data["cause"]) == (name, ranks, cause)
    assert failed.data["margin"] > 1e3


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("Layer, making the layer: ValueError: 3 is odd", "refused"),
        ("Layer, making the layer: IndexError: 3", "error"),
        ("Layer, forward: ValueError: 3", "error"),
    ],
)
def test_a_crash_is_a_refusal_only_when_the_layer_refuses_to_be_made(message: str, status: str) -> None:
    assert crashed_trial(Trial("Layer"), message, Options(), {}, "command").status == status


def test_messages_are_counted_without_their_numbers() -> None:
    assert in_general("\n 3 of 14\nmore") == "N of N"
