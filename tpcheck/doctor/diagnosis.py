"""The diagnosis of this machine and of a DeepSpeed configuration, and its text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.doctor.advice import Advice
from tpcheck.doctor.deepspeed import Saved, config_advice, what_is_saved
from tpcheck.doctor.machine import (
    bad_versions,
    devices,
    extension_caches,
    installed_versions,
    leaked_shared_memory,
    stale_locks,
)
from tpcheck.report import words
from tpcheck.report.table import Cell, Column, Row, Table, table_lines
from tpcheck.report.words import Line, labelled, plain


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Versions, devices and problems.

    Attributes:
        versions: By package name; None for a package that is not installed.
        devices: Processors and accelerators, as text.
        advice: The problems.
        saved: The files of each way of saving; empty without a configuration.
    """

    versions: Mapping[str, str | None]
    devices: tuple[str, ...]
    advice: tuple[Advice, ...]
    saved: tuple[Saved, ...] = ()


def _home() -> Path:
    """Return the home directory; without one the relative path `~`, as torch does."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and no line in /etc/passwd, as under `docker run --user 12345`
        return Path("~")


def diagnose(config: Mapping[str, Any] | None = None) -> Diagnosis:
    """Return the problems of this machine and of a DeepSpeed configuration."""
    versions = installed_versions()
    advice = (
        *bad_versions(versions),
        *stale_locks(extension_caches(os.environ, _home())),
        *leaked_shared_memory(),
        *(config_advice(config) if config is not None else ()),
    )
    saved = tuple(what_is_saved(config)) if config is not None else ()
    return Diagnosis(versions, devices(), advice, saved)


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[Line]:
    """Yield versions and devices, then the problems."""
    versions = (f"{package} {version or 'is not installed'}" for package, version in diagnosis.versions.items())
    yield from labelled("versions", ", ".join(versions))
    yield from labelled("devices", ", ".join(diagnosis.devices))
    if diagnosis.saved:
        yield Line()
        yield plain("files that this configuration saves", "bold")
        rows = (
            Row((Cell(saved.way), Cell(saved.writes, "" if saved.is_model else "yellow"))) for saved in diagnosis.saved
        )
        yield from table_lines(Table((Column("call"), Column("writes")), tuple(rows), indent=2))
    for advice in diagnosis.advice:
        yield Line()
        yield plain(advice.rule, "bold yellow")
        yield from labelled("what", advice.what)
        if advice.fix:
            yield from labelled("fix", advice.fix, "cyan")
        if advice.link:
            yield from labelled("see", advice.link, "dim")
    yield Line()
    if diagnosis.advice:
        yield plain(words.pluralize(len(diagnosis.advice), "finding"), "bold red")
    else:
        yield plain("no problems", "bold green")
