"""What a rank does in the tests: makes batches, plants a fault, follows them through `watch`, and tells what it saw."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpcheck import Rank

Plant = Callable[[Rank, list[Any]], Any]  # gets the batches of one epoch; returns others, or changes them in place


@dataclass
class Seen:
    """What one rank's loop came to."""

    batches: int
    seconds: float
    error: str | None = None
    text: str = ""
    findings: tuple[Any, ...] = ()
    warned: tuple[str, ...] = ()
    reports: int = 0


def batches(rank: Rank, *, number: int = 4, shift: int | None = None) -> list[dict[str, Any]]:
    """Return batches of 3 samples that are the same inside a TP group and others on each replica."""
    import torch

    generator = torch.Generator().manual_seed(rank.dp_rank if shift is None else shift)
    return [
        {
            "pixels": torch.randn(3, 2, 4, 4, generator=generator),
            "labels": torch.randint(10, (3,), generator=generator),
            "extra": {"weight": 0.5, "boxes": [torch.randn(2, 4, generator=generator), None], "name": "train"},
        }
        for _ in range(number)
    ]


def follow(
    rank: Rank, plant: Plant | None = None, *, epochs: int = 1, made: Callable[[Rank], Any] = batches, **options: Any
) -> Seen:
    import tpcheck

    given = made(rank)
    if plant is not None:
        given = plant(rank, given) or given
    reports: list[Any] = []
    if options.get("on_mismatch") == "call":
        options["on_mismatch"] = reports.append
    options = {"topology": rank.topology, "across_dp": "raise", "timeout": 20.0, **options}
    start, seen = time.monotonic(), Seen(0, 0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loader = tpcheck.watch(given, **options)
            for _ in range(epochs):
                for _batch in loader:
                    seen.batches += 1
        except Exception as error:
            seen.error, seen.text = type(error).__name__, str(error)
            seen.findings = getattr(getattr(error, "report", None), "findings", ())
    seen.seconds = time.monotonic() - start
    seen.warned = tuple(
        str(each.message) for each in caught if "tpcheck" in str(each.message) or "batches" in str(each.message)
    )
    seen.reports = len(reports)
    if reports:
        seen.findings = reports[0].findings
    return seen


def on(rank_number: int) -> Callable[[Callable[[list[Any]], Any]], Plant]:
    """Return a decorator for a fault that is planted on one rank."""

    def decorate(change: Callable[[list[Any]], Any]) -> Plant:
        return lambda rank, given: change(given) if rank.rank == rank_number else None

    return decorate
