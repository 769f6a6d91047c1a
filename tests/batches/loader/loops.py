"""What a rank does in the tests: makes batches, injects a fault, iterates through `watch`, returns what happened."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpcheck import Rank

Fault = Callable[[Rank, list[Any]], Any]  # takes the batches of one epoch; returns others, or changes them in place


@dataclass
class LoopResult:
    """What happened in one rank's loop."""

    batches: int
    seconds: float
    error: str | None = None
    text: str = ""  # of the report, where the error has one
    printed: str = ""  # of the error that has a report
    findings: tuple[Any, ...] = ()
    warned: tuple[str, ...] = ()
    reports: int = 0


def batches(rank: Rank, *, number: int = 4, shift: int | None = None) -> list[dict[str, Any]]:
    """Return batches of 3 samples, the same inside a TP group and different on each replica."""
    import torch

    generator = torch.Generator().manual_seed(rank.dp_rank if shift is None else shift)
    return [
        {
            "pixels": torch.randn(3, 2, 4, 4, generator=generator),
            "labels": torch.randint(10, (3,), generator=generator),
            "extra": {"weight": 0.5, "boxes": [torch.randn(2, 4, generator=generator), None], "name": "train"},
            "scale": torch.tensor(8.0),
        }
        for _ in range(number)
    ]


def run_loop(
    rank: Rank, fault: Fault | None = None, *, epochs: int = 1, make: Callable[[Rank], Any] = batches, **options: Any
) -> LoopResult:
    import tpcheck

    given = make(rank)
    if fault is not None:
        given = fault(rank, given) or given
    reports: list[Any] = []
    if options.get("on_mismatch") == "call":
        options["on_mismatch"] = reports.append
    options = {"topology": rank.topology, "across_dp": "raise", "over_steps": "raise", "timeout": 20.0, **options}
    start, result = time.monotonic(), LoopResult(0, 0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loader = tpcheck.watch(given, **options)
            for _ in range(epochs):
                for _batch in loader:
                    result.batches += 1
        except Exception as error:
            result.error, result.text = type(error).__name__, str(error)
            if isinstance(error, tpcheck.Mismatch):
                result.printed, result.text = result.text, error.report.to_text()
                result.findings = error.report.findings
    result.seconds = time.monotonic() - start
    result.warned = tuple(
        str(each.message) for each in caught if "tpcheck" in str(each.message) or "batches" in str(each.message)
    )
    result.reports = len(reports)
    if reports:
        result.findings = reports[0].findings
    return result
