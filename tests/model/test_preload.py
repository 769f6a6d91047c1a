"""The forkserver imports what all ranks of a verification need."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tpcheck import Topology
from tpcheck.model.options import Request, RunOptions
from tpcheck.model.preload import preload_of
from tpcheck.model.targets import resolve

QWEN = "transformers.models.qwen3.modeling_qwen3"


def preloaded(family: str = "qwen3", **options: Any) -> tuple[str, ...]:
    run_options = RunOptions.of(topology=Topology(tp=2), **options)
    target = resolve(family, run_options)
    return preload_of(Request(target.build, run_options, modules=target.modules))


def test_the_modules_of_backend_option_and_family_are_imported_once() -> None:
    modules = preloaded(backend="deepspeed", zero_stage=1)
    assert {"tpcheck.model.rank_run", "tpcheck.backends.deepspeed", QWEN} <= {*modules}
    assert any("zero" in module for module in modules)
    assert not any("zero" in module for module in preloaded(backend="deepspeed"))


def test_where_there_are_gpus_no_module_of_a_model_is_imported_before_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpcheck.model.preload.visible_gpus", lambda environ: 1 if environ is os.environ else 0)
    assert QWEN not in preloaded()
    assert QWEN in preloaded(device="cpu")
