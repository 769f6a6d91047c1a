"""The register of known upstream bugs (`known.toml`), and how a verdict stands to it. No torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from tpcheck.core.findings import Verdict
from tpcheck.families.settings import overlay
from tpcheck.lab.fuzz.results import Trial

REGISTER = Path(__file__).parent / "known.toml"
CHECKPOINT = "checkpoint_matches_reference"  # the one check that is not run unless asked for
Standing = Literal["", "known", "new", "gone"]


@dataclass(frozen=True, slots=True)
class KnownBug:
    """A bug of a backend or of transformers that has been reproduced.

    Attributes:
        name: Its slug.
        families: Model types that show it.
        anywhere: Other families and settings may show it, too: it is a bug of the backend alone.
        backend: Name of the backend that shows it.
        versions: The versions that show it, as a specifier by package.
        verdict: What a run says: `failed` (silent without tpcheck) or `error` (loud).
        what: What is wrong, in a sentence.
        again: The command that repeats it.
        check: The check that fails first; None for any.
        message: A part of the backend's own message.
        settings: Settings of the model that it needs.
        config: Backend configuration that it needs.
        ignore_plan: It needs the model's tp_plan to be dropped.
        only: Values of other options (`tp`, `dp`, `zero`, `dtype`) to which it is confined.
        script: A program without tpcheck that shows it, in `docs/upstream/`.
        link: Where it is reported upstream.
    """

    name: str
    families: tuple[str, ...]
    backend: str
    versions: Mapping[str, str]
    verdict: Literal["failed", "error"]
    what: str
    again: str
    check: str | None = None
    message: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    ignore_plan: bool = False
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    script: str | None = None
    link: str | None = None
    anywhere: bool = False

    def concerns(self, verdict: Verdict) -> bool:
        """Return whether a run of this subject, with these versions, should show the bug."""
        same_config = dict(verdict.subject.get("config") or {}) == dict(self.config)
        return same_config and self._is_of_model(verdict) and self._fits(verdict)

    def may_concern(self, verdict: Verdict) -> bool:
        """Return whether a run of this subject, with these versions, could show the bug, beside others of its own."""
        config = verdict.subject.get("config") or {}
        return overlay(config, self.config) == config and (
            (self.anywhere or self._is_of_model(verdict)) and self._fits(verdict)
        )

    def _is_of_model(self, verdict: Verdict) -> bool:
        settings = verdict.subject.get("settings") or {}
        return verdict.subject.get("family") in self.families and all(
            key in settings and settings[key] == value for key, value in self.settings.items()
        )

    def _fits(self, verdict: Verdict) -> bool:
        subject = verdict.subject
        return (
            subject.get("backend") == self.backend
            and bool(subject.get("ignore_plan")) == self.ignore_plan
            and all(subject.get(key) in values for key, values in self.only.items())
            and self._is_asked_for(subject.get("checks"))
            and all(_holds(verdict.environment.get(name), wanted) for name, wanted in self.versions.items())
        )

    def is_shown_by(self, verdict: Verdict) -> bool:
        """Return whether that is what the verdict says."""
        if verdict.verdict != self.verdict or self.message not in (verdict.message or ""):
            return False
        return self.check is None or any(finding.check == self.check for finding in verdict.findings)

    def _is_asked_for(self, checks: Iterable[str] | None) -> bool:
        if checks is None:
            return self.check != CHECKPOINT
        return self.check is None or self.check in checks


@dataclass(frozen=True, slots=True)
class KnownLayerBug:
    """A bug of single layers of a backend that has been reproduced.

    Attributes:
        layers: Names of the layers that show it.
        tensor: What is wrong, for `failed`.
        when: Values of a trial to which it is confined, such as `strides`; of `options`, those that it needs.

    The others are those of `KnownBug`.
    """

    name: str
    layers: tuple[str, ...]
    backend: str
    versions: Mapping[str, str]
    verdict: Literal["failed", "error"]
    what: str
    again: str
    tensor: str = ""
    message: str = ""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    script: str | None = None
    link: str | None = None

    def explains(
        self,
        trial: Trial,
        backend: str,
        versions: Mapping[str, str],
        *,
        verdict: str,
        tensor: str = "",
        message: str = "",
    ) -> bool:
        """Return whether that is what came of the trial."""
        return (
            (self.backend, self.verdict) == (backend, verdict)
            and trial.layer in self.layers
            and self.tensor == tensor
            and self.message in message
            and all(getattr(trial, name) in values for name, values in self.when.items())
            and overlay(trial.options, self.options) == dict(trial.options)
            and all(_holds(versions.get(name), wanted) for name, wanted in self.versions.items())
        )


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict and what the register says of it.

    Attributes:
        verdict: What came of the run.
        standing: `known` (as the register says), `new` (it says nothing of this), `gone` (it says that this fails, and
            it passed), or empty.
        bug: The entry, for `known` and `gone`; for `new`, one that fails otherwise than it says, if there is one.
    """

    verdict: Verdict
    standing: Standing = ""
    bug: KnownBug | None = None


def judged(verdict: Verdict) -> Judged:
    """Hold a verdict against the register."""
    concerned = [bug for bug in register() if bug.concerns(verdict)]
    shown = next((bug for bug in concerned if bug.is_shown_by(verdict)), None)
    if verdict.verdict in ("failed", "error"):
        return Judged(verdict, "known", shown) if shown else Judged(verdict, "new", next(iter(concerned), None))
    if verdict.verdict == "passed" and concerned:
        return Judged(verdict, "gone", concerned[0])
    return Judged(verdict)


def explained(verdict: Verdict) -> KnownBug | None:
    """Return the registered bug that a failure shows, whatever else was configured beside what the bug needs."""
    return next((bug for bug in register() if bug.may_concern(verdict) and bug.is_shown_by(verdict)), None)


@cache
def register() -> tuple[KnownBug, ...]:
    """Return every entry of `known.toml`."""
    return tuple(_entry(row) for row in _rows("bug"))


@cache
def layer_register() -> tuple[KnownLayerBug, ...]:
    """Return every entry of `known.toml` that is about single layers."""
    return tuple(
        KnownLayerBug(
            **{**row, "layers": tuple(row["layers"]), "when": {key: tuple(v) for key, v in row["when"].items()}}
        )
        for row in _rows("layer_bug")
    )


def _rows(kind: str) -> list[dict[str, Any]]:
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    rows: list[dict[str, Any]] = toml.loads(REGISTER.read_text(encoding="utf-8")).get(kind, [])
    return rows


def _entry(row: Mapping[str, Any]) -> KnownBug:
    lists = {"families": tuple(row["families"]), "only": {key: tuple(v) for key, v in row.get("only", {}).items()}}
    return KnownBug(**{**row, **lists})


def _holds(version: str | None, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return version is not None and SpecifierSet(wanted).contains(version, prereleases=True)
