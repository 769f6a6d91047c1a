"""The forkserver imports what all ranks of a verification need."""

from __future__ import annotations

from typing import Any

from tpcheck import Topology
from tpcheck.model.options import Request, RunOptions
from tpcheck.model.preload import preload_of


def preloaded(**options: Any) -> tuple[str, ...]:
    return preload_of(Request(dict, RunOptions.of(topology=Topology(tp=2), **options)))


def test_the_modules_of_backend_and_options_are_imported_once() -> None:
    modules = preloaded(backend="deepspeed", zero_stage=1)
    assert {"tpcheck.model.rank_run", "tpcheck.backends.deepspeed"} <= {*modules}
    assert any("zero" in module for module in modules)
    assert not any("zero" in module for module in preloaded(backend="deepspeed"))


def test_what_each_world_of_resuming_needs_is_imported_once() -> None:
    of_resuming = {"tpcheck.model.resuming", "tpcheck.backends.transformers"}
    assert of_resuming <= {*preloaded(backend="deepspeed", checks=("resume_matches_uninterrupted",))}
    assert not of_resuming & {*preloaded(backend="deepspeed")}


def test_nothing_is_imported_of_a_backend_that_is_not_of_this_package() -> None:
    assert preloaded(backend="nosuch") == ("tpcheck.model.rank_run",)
