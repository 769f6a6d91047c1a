"""CUDA graphs: hooks that are called while one is captured leave it alone. No GPU: torch is made to say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tpcheck
from tpcheck import Topology, UsageError
from tpcheck.core.cuda import is_capturing, uses_cuda


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_process_without_cuda_captures_nothing() -> None:
    assert not uses_cuda()
    assert not is_capturing()


def test_what_is_captured_is_not_checked_and_not_recorded(capturing: None, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logged: list[Any] = []
    with tpcheck.guard(model, optimizer=optimizer, topology=Topology(tp=1), every=1, log=logged.append):
        recorder = tpcheck.record(model, tmp_path / "trace", optimizer=optimizer, topology=Topology(tp=1))
        recorder.__enter__()
        for _ in range(3):
            step(model, optimizer)
        with pytest.raises(UsageError, match="a model that is called inside the context"):
            recorder.__exit__(None, None, None)
    assert logged == []
