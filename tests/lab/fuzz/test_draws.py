"""Configurations are drawn from what a family has, and from nothing that the user has fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpcheck import UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.families.build import dimensions
from tpcheck.lab.fuzz.draws import Bounds, family_examples
from tpcheck.model.options import RunOptions, Tokens


class Backend:
    """Has two ZeRO stages and an option; shards nothing."""

    name = "two stages"

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        if options.zero_stage > 1:
            raise UsageError("zero_stage", options.zero_stage, "0 or 1")
        return options

    def options(self) -> Sequence[Mapping[str, Any]]:
        return ({"a": {"b": 1}}, {"a": {"c": 2}})

    def shard(self) -> None: ...


BACKEND: Any = Backend()


def examples(bounds: Bounds = Bounds(), **fixed: Any) -> st.SearchStrategy[RunOptions]:  # noqa: B008 - immutable
    return family_examples("llama", bounds, RunOptions(backend=BACKEND, **fixed))


quickly = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
LLAMA = examples()
FIXED = examples(settings={"vocab_size": 33}, config={"a": {"b": 7}})


@quickly
@given(LLAMA)
def test_what_is_drawn_is_what_the_family_and_the_backend_have(drawn: RunOptions) -> None:
    there = dimensions("llama")
    names = {name for of_role in there.names.values() for name in of_role}
    assert set(drawn.settings) <= names | set(there.switches)
    assert drawn.zero_stage in (0, 1)
    assert drawn.config in ({}, {"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}})
    assert drawn.batch is None or isinstance(drawn.batch, Tokens)


@quickly
@given(FIXED)
def test_what_is_fixed_stays(drawn: RunOptions) -> None:
    assert drawn.settings["vocab_size"] == 33
    assert drawn.config["a"]["b"] == 7


def test_the_smallest_is_a_plain_verification() -> None:
    from hypothesis import find

    smallest = find(LLAMA, lambda drawn: True, settings=quickly)
    assert smallest == RunOptions(backend=BACKEND)


def test_a_backend_with_none_of_the_stages_lists_its_own() -> None:
    with pytest.raises(UsageError, match="0 or 1"):
        examples(Bounds(zero=(2, 3)))


@pytest.mark.parametrize("bad", [{"tp": [0]}, {"dp": [-1]}, {"zero": [4]}, {"dtype": ["int8"]}])
def test_invalid_bounds_are_bad_usage(bad: dict[str, Any]) -> None:
    good = {"tp": [2], "dp": [1], "zero": [0], "dtype": ["float64"]}
    with pytest.raises(UsageError):
        Bounds.of(**{**good, **bad})
