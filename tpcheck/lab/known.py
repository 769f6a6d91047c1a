"""The register of known upstream bugs (`known.toml`), and the comparison of verdicts with it. No torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from tpcheck.core.check_names import ON_REQUEST
from tpcheck.core.findings import Verdict
from tpcheck.families.settings import overlay
from tpcheck.lab.fuzz.results import Trial

REGISTER = Path(__file__).parent / "known.toml"
Standing = Literal["", "known", "new", "gone"]


@dataclass(frozen=True, slots=True)
class KnownBug:
    """A reproduced bug of a backend or of transformers.

    Attributes:
        name: Its slug.
        families: Model types with the bug.
        anywhere: Whether other families and settings may have it, too: a bug of the backend alone.
        backend: Name of the backend with the bug.
        versions: The affected versions, as a specifier by package.
        verdict: The verdict of a run: `failed` (silent without tpcheck) or `error` (a crash).
        what: What is wrong, in a sentence.
        again: The command that reproduces it.
        check: The check that fails first; None for any.
        message: A part of the backend's own message.
        settings: Settings of the model that it needs.
        config: Backend configuration that it needs.
        ignore_plan: Whether it shows only without the model's tp_plan.
        only: Values of other options (`tp`, `dp`, `zero`, `dtype`) that it is limited to.
        script: A program without tpcheck that shows it, in `docs/upstream/`.
        link: The upstream issue.
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

    @property
    def installed_script(self) -> str | None:
        """Where the script is: in the installed package, or else in the source."""
        if self.script is None:
            return None
        installed = Path(__file__).parents[1] / "upstream" / Path(self.script).name
        return str(installed) if installed.exists() else self.script

    def concerns(self, verdict: Verdict) -> bool:
        """Return whether a run of this subject, with these versions, should show the bug."""
        same_config = dict(verdict.subject.get("config") or {}) == dict(self.config)
        return same_config and self._matches_model(verdict) and self._matches_run(verdict)

    def may_concern(self, verdict: Verdict) -> bool:
        """Return whether a run of this subject, with these versions, could show the bug among others."""
        config = verdict.subject.get("config") or {}
        return overlay(config, self.config) == config and (
            (self.anywhere or self._matches_model(verdict)) and self._matches_run(verdict)
        )

    def _matches_model(self, verdict: Verdict) -> bool:
        subject = verdict.subject
        settings = {**(subject.get("configuration") or {}), **(subject.get("settings") or {})}
        return subject.get("family") in self.families and all(
            key in settings and settings[key] == value for key, value in self.settings.items()
        )

    def _matches_run(self, verdict: Verdict) -> bool:
        subject = verdict.subject
        return (
            subject.get("backend") == self.backend
            and bool(subject.get("ignore_plan")) == self.ignore_plan
            and all(subject.get(key) in values for key, values in self.only.items())
            and self._is_checked(subject.get("checks"))
            and all(_is_affected(verdict.environment.get(name), specifier) for name, specifier in self.versions.items())
        )

    def is_shown_by(self, verdict: Verdict) -> bool:
        """Return whether the verdict shows the bug."""
        if verdict.verdict != self.verdict or self.message not in (verdict.message or ""):
            return False
        failed = {finding.check for finding in verdict.findings}
        if self.check in ON_REQUEST:  # a bug of saving explains no other failure beside it
            return failed == {self.check}
        return self.check is None or self.check in failed

    def _is_checked(self, checks: Iterable[str] | None) -> bool:
        if checks is None:
            return self.check not in ON_REQUEST
        return self.check is None or bool({self.check, "all"} & {*checks})


@dataclass(frozen=True, slots=True)
class KnownLayerBug:
    """A reproduced bug of single layers of a backend.

    Attributes:
        layers: Names of the layers with the bug.
        tensor: The wrong tensor, for `failed`.
        when: Values of a trial that it is limited to, such as those of `strides`.
        options: Settings of the layers that it needs.

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
        """Return whether the bug explains this outcome of a trial."""
        return (
            (self.backend, self.verdict) == (backend, verdict)
            and trial.layer in self.layers
            and self.tensor == tensor
            and self.message in message
            and all(getattr(trial, name) in values for name, values in self.when.items())
            and overlay(trial.options, self.options) == dict(trial.options)
            and all(_is_affected(versions.get(name), specifier) for name, specifier in self.versions.items())
        )


@dataclass(frozen=True, slots=True)
class JudgedVerdict:
    """A verdict compared with the register.

    Attributes:
        verdict: The verdict of the run.
        standing: `known` (a registered bug shows), `new` (a failure that no entry describes), `gone` (a registered bug
            does not show), or empty.
        bug: The entry, for `known` and `gone`; for `new`, an entry of this subject that describes another failure.
    """

    verdict: Verdict
    standing: Standing = ""
    bug: KnownBug | None = None


def judge(verdict: Verdict) -> JudgedVerdict:
    """Compare a verdict with the register."""
    concerned = [bug for bug in register() if bug.concerns(verdict)]
    shown = next((bug for bug in concerned if bug.is_shown_by(verdict)), None)
    if shown is None and "target" in verdict.subject:  # whose configuration is the user's own
        shown = explained(verdict)
    if verdict.verdict in ("failed", "error"):
        return (
            JudgedVerdict(verdict, "known", shown)
            if shown
            else JudgedVerdict(verdict, "new", next(iter(concerned), None))
        )
    if verdict.verdict == "passed" and concerned:
        return JudgedVerdict(verdict, "gone", concerned[0])
    return JudgedVerdict(verdict)


def explained(verdict: Verdict) -> KnownBug | None:
    """Return the registered bug that a failure shows, also with more configuration than the bug needs."""
    return next((bug for bug in register() if bug.may_concern(verdict) and bug.is_shown_by(verdict)), None)


@cache
def register() -> tuple[KnownBug, ...]:
    """Return every entry of `known.toml`."""
    return tuple(_entry(row) for row in _rows("bug"))


@cache
def layer_register() -> tuple[KnownLayerBug, ...]:
    """Return every entry of `known.toml` about single layers."""
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


def _is_affected(version: str | None, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return version is not None and SpecifierSet(specifier).contains(version, prereleases=True)
