"""Runs a search, tells of each example as it comes, and of all at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tpcheck.cli.fuzz_progress import telling
from tpcheck.cli.results import all_written
from tpcheck.cli.terminal import BAD_USAGE, INTERRUPTED, show, write_whole
from tpcheck.records.fuzzed import Found, Outcome, Searched
from tpcheck.report.fuzz import layers_data, layers_lines, searched_data, searched_json, searched_lines, verdict_of

if TYPE_CHECKING:
    from tpcheck.api.fuzz import Bounds, Common, Limits

_STATUS = {"passed": 0, "failed": 1, "skipped": BAD_USAGE, "error": 3}


@dataclass(frozen=True, slots=True)
class LayersWanted:
    """Which layers are tried: those of these names, or all; or one try of one."""

    backend: str
    names: Sequence[str]
    trial: str | None
    known: bool
    timeout: float


def run_family(family: str, bounds: Bounds, common: Common, limits: Limits, json_path: Path | None) -> int:
    """Search a family, and return the exit status."""
    from tpcheck.api.fuzz import fuzz_family

    with telling(limits.examples) as told:
        searched = fuzz_family(family, bounds, common, limits, told)
    writes = [lambda: show(searched_lines(searched))]
    if json_path:
        writes.append(lambda: write_whole(json_path, searched_json(searched_data(searched))))
    return exit_status([searched]) if all_written(writes) else BAD_USAGE


def run_layers(wanted: LayersWanted, bounds: Bounds, limits: Limits, json_path: Path | None) -> int:
    """Search layers one by one, and return the exit status."""
    from tpcheck.api.fuzz import LayerCommon, fuzz_layers, read_trial, try_one

    common = LayerCommon(wanted.backend, bounds.tp, bounds.dtype, wanted.known, wanted.timeout)
    if wanted.trial is not None:
        trial = read_trial(wanted.trial)
        with telling(1):
            outcome = try_one(trial, common)
        searched = [_of_one(outcome, {"layer": trial.layer, "backend": wanted.backend})]
    else:
        with telling(limits.examples) as told:
            searched = list(fuzz_layers(wanted.names, common, limits, told))
    writes = [lambda: show(layers_lines(searched))]
    if json_path:
        writes.append(lambda: write_whole(json_path, searched_json(layers_data(searched))))
    return exit_status(searched) if all_written(writes) else BAD_USAGE


def exit_status(searched: Sequence[Searched]) -> int:
    """Return 1 after findings, 3 after a crash, 2 where nothing could be run, 130 for Ctrl-C before any of them."""
    status = _STATUS[verdict_of(searched)]
    interrupted = any(one.interrupted for one in searched)
    return INTERRUPTED if interrupted and status in (0, BAD_USAGE) else status


def _of_one(outcome: Outcome, subject: dict[str, str]) -> Searched:
    found = (Found(outcome, outcome, outcome.command),) if outcome.is_bad else ()
    return Searched(subject, (outcome,), found)
