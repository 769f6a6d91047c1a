"""Single layers: a lost reduction is found, shrunk and repeated; right ones pass; none is left out unsaid.

Outcomes of trials are tested on hand-made tensors of two ranks.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tpcheck import UsageError
from tpcheck.backends.interface import NO_ROW, LayerTable
from tpcheck.backends.registry import load_backend
from tpcheck.lab.fuzz.layer_trial import RankTrial, TriedTensor
from tpcheck.lab.fuzz.layers import LayerCommon, Worlds, fuzz_layers, try_one
from tpcheck.lab.fuzz.results import INPUT_GRADIENT, OUTPUT, Outcome, SearchResult, Trial, in_general
from tpcheck.lab.fuzz.search import Limits

TWO_RANKS = LayerCommon(tp=(2,))


def searched(layers: list[str], examples: int, seed: int = 0, **common: Any) -> list[SearchResult]:
    on_outcome: Any = lambda outcome, *, shrinking: None  # noqa: E731
    return list(fuzz_layers(layers, LayerCommon(**{"tp": (2,), **common}), Limits(examples, seed), on_outcome))


def test_the_lost_reduction_is_found_in_its_smallest_form() -> None:
    (result,) = searched(["SubParamLinearLayer"], examples=20, seed=15, dtype=("float64",))
    (found,) = result.found
    assert found.outcome.data["tensor"] == "gradient of the input"
    assert found.outcome.data["ranks"] == [1]
    trial = Trial.parse(shlex.split(found.outcome.command)[-1])
    assert trial == Trial("SubParamLinearLayer", inputs=2, rows=(2,), strides="transposed")

    from tpcheck.cli import app

    again = CliRunner().invoke(app, shlex.split(found.outcome.command)[1:])
    assert (again.exit_code, "gradient of the input" in again.stdout) == (1, True)


def test_the_lost_reduction_is_named_where_every_rank_has_a_term() -> None:
    """Of a single output rank 0 has all and rank 1 nothing, as where rank 1 has lost its gradient."""
    trial = Trial("SubParamLinearLayer", inputs=2, outputs=4, rows=(2,), strides="transposed")
    assert try_one(trial, TWO_RANKS).data["cause"] == "missing_reduce"


def test_the_same_layer_is_right_where_tensors_are_contiguous_and_known_where_the_bug_is_known() -> None:
    trial = Trial("LinearLayer", inputs=3, outputs=5, rows=(2, 3), bias=True)
    assert try_one(trial, TWO_RANKS).status == "passed"
    lost = Trial("LinearLayer", inputs=2, rows=(2,), strides="transposed")
    assert try_one(lost, LayerCommon(tp=(2,), known=True)).kind == "deepspeed-column-lost-reduction"


def test_layers_of_transformers_pass() -> None:
    layers = ["rowwise", "colwise", "embedding_rowwise"]
    assert [one.verdict for one in searched(layers, 6, backend="transformers", known=True)] == ["passed"] * 3


def test_a_bias_that_is_cut_differently_from_its_weight_is_found() -> None:
    of_transformers = LayerCommon("transformers", tp=(2,))
    assert try_one(Trial("packed_colwise", outputs=2), of_transformers).status == "passed"
    wrong = try_one(Trial("packed_colwise", outputs=2, bias=True), of_transformers)
    assert (wrong.status, wrong.data["tensor"]) == ("failed", "output")


def test_a_refusal_of_a_layer_is_no_finding_but_a_crash_is() -> None:
    assert try_one(Trial("VocabParallelLinear"), TWO_RANKS).status == "refused"
    crash = try_one(Trial("conv_LinearLayer", outputs=2), TWO_RANKS)
    assert (crash.status, crash.reason.startswith("conv_LinearLayer, making the layer: ")) == ("error", True)


@pytest.mark.parametrize("backend", ["deepspeed", "dtensor", "megatron", "transformers"])
def test_every_layer_of_the_installed_backend_is_tried_or_has_a_reason(backend: str) -> None:
    table: LayerTable = load_backend(backend).layer_table()  # type: ignore[attr-defined]
    assert all((layer.shard is None) == bool(layer.why_not) for layer in table.layers)
    assert not [layer.name for layer in table.layers if layer.why_not == NO_ROW]
    assert len({layer.name for layer in table.layers}) == len(table.layers)


def test_a_backend_without_layers_of_its_own_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="whose layers can be tried one by one"):
        searched([], 1, backend="custom")


def test_an_unknown_layer_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="LinearLayer"):
        searched(["Linear"], 1)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"layer": "a", "x": 1}', '{"layer": "a", "rows": [0]}', '{"layer": "a", "strides": "odd"}'],
)
def test_an_invalid_trial_is_bad_usage(text: str) -> None:
    with pytest.raises(UsageError, match="trial"):
        Trial.parse(text)


def test_a_trial_is_read_as_it_is_written() -> None:
    trial = Trial("a", 4, 3, 2, (1, 2), True, "float32", "sliced", "expanded", {"x": True})
    assert Trial.parse(trial.to_json()) == trial
    assert json.loads(Trial("a").to_json()) == {"layer": "a"}


WHOLE = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)
TERM = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def outcome(name: str, actual: list[torch.Tensor], positions: tuple[list[int], list[int]] = ([0], [1])) -> Outcome:
    ranks = [
        RankTrial({name: TriedTensor(tensor, WHOLE, 1e-12)}, {"weight": torch.tensor(held)})
        for tensor, held in zip(actual, positions, strict=True)
    ]
    return Worlds(TWO_RANKS, {}).judge(Trial("Layer"), ranks)


def test_a_weight_that_all_ranks_hold_whole_is_refused_unless_the_layer_replicates_it() -> None:
    whole = torch.arange(2)
    tensors = {OUTPUT: TriedTensor(WHOLE, WHOLE, 1e-12)}
    for replicates, status in (((), "refused"), (("router",), "refused"), (("weight",), "passed"), (("",), "passed")):
        ranks = [RankTrial(tensors, {"weight": whole}, replicates) for _ in range(2)]
        assert Worlds(TWO_RANKS, {}).judge(Trial("Layer"), ranks).status == status


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
    assert (failed.status, failed.kind) == ("failed", f"Layer {name}")
    assert Trial.parse(shlex.split(failed.command)[-1]) == Trial("Layer")
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
    assert Worlds(TWO_RANKS, {}).judge_crash(Trial("Layer"), message).status == status


def test_messages_are_counted_without_their_numbers() -> None:
    assert in_general("\n 3 of 14\nmore") == "N of N"
