"""A training loop as a row of a table: what is trained, on which ranks, and what comparing its trace must say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import torch

import tpcheck
from tpcheck import Rank, Report, Topology

Weights = Mapping[str, torch.Tensor]  # this rank's, by name; whole where a library gathers them


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a loop on one rank.

    Attributes:
        rank: Of the world that the loop runs in.
        path: Of the trace; None to train without tpcheck.
        options: Of `tpcheck.record`.
    """

    rank: Rank
    path: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tp(self) -> int:
        return self.rank.topology.tp

    @property
    def dp(self) -> int:
        return self.rank.topology.dp

    @property
    def tp_rank(self) -> int:
        return self.rank.tp_rank

    @property
    def dp_rank(self) -> int:
        return self.rank.dp_rank

    def record(self, model: Any, optimizer: Any = None) -> AbstractContextManager[Any]:
        if self.path is None:
            return nullcontext()
        return tpcheck.record(model, self.path, optimizer=optimizer, topology=self.rank.topology, **self.options)


class TrainingLike(Protocol):
    """A training: made for a run, with options, and run by `train`."""

    def __init__(self, run: Run, **options: Any) -> None: ...

    def train(self) -> Weights:
        """Train, and return this rank's weights at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two runs that are compared.

    Attributes:
        training: What runs on each rank.
        topology: Of its world.
        options: Of the training.
        record: Options of `tpcheck.record`.
    """

    training: type[TrainingLike]
    topology: Topology
    options: tuple[tuple[str, Any], ...] = ()
    record: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Wrong:
    """What the report of a wrong loop must say.

    Attributes:
        checks: One of these fails.
        names: Patterns of modules and parameters; the finding is at one of them.
        cause: Slug; None where none is defined.
        ranks: The finding's; None for whichever.
        step: The finding's; None for whichever.
        evidence: Texts that the finding holds: in its evidence, its place, or its phrases.
        every_name: All modules and parameters that findings of these checks name; none else is blamed.
    """

    checks: tuple[str, ...]
    names: tuple[str, ...] = ("*",)
    cause: str | None = None
    ranks: tuple[int, ...] | None = None
    step: int | None = None
    evidence: tuple[str, ...] = ()
    every_name: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Loop:
    """A row of the table.

    Attributes:
        name: Sentence that the test is called by.
        actual: The run that is judged.
        expected: What it is judged by.
        wrong: What is wrong with it; None where it is right.
        agreement: Largest relative error, without tpcheck, of a right loop's weights at its end; 0 for equal bits, None
            where it has no meaning. A wrong loop's weights part by more, unless this is None.
        xfail: Why it does not pass yet.
        names: Of ready maps of names between the two runs.
    """

    name: str
    actual: Side
    expected: Side
    wrong: Wrong | None = None
    agreement: float | None = 1e-12
    xfail: str | None = None
    names: tuple[str, ...] = ()


def train(rank: Rank, side: Side, path: Path | None) -> Weights:
    """Run one side of a loop on one rank."""
    torch.use_deterministic_algorithms(False)
    return side.training(Run(rank, path, dict(side.record)), **dict(side.options)).train()


def disagreement(actual: Sequence[Weights], expected: Sequence[Weights], loop: Loop) -> float:
    """Return the largest relative error of the weights on any rank, against those of the expected run's first TP group.

    A weight whose local shapes differ between the two runs is cut along the dim where they do.
    """
    expected_parts = [expected[rank] for rank in loop.expected.topology.groups("tp")[0]]
    errors = [0.0]
    for group in loop.actual.topology.groups("tp"):
        for name in expected_parts[0]:
            pairs = _comparable([actual[rank][name] for rank in group], [part[name] for part in expected_parts])
            errors += [float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs]
    return max(errors)


def _comparable(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    shape, expected_shape = actual[0].shape, expected[0].shape
    if shape == expected_shape:
        return list(zip(actual, cycle(expected)))  # the same shards, or replicas
    (dim,) = [dim for dim in range(len(shape)) if shape[dim] != expected_shape[dim]]
    return [(torch.cat(list(actual), dim), torch.cat(list(expected), dim))]


def complaints(report: Report, wrong: Wrong) -> list[str]:
    """Return what the report of a wrong loop fails to say; nothing where it says it all."""
    findings = [finding for finding in report.findings if finding.check in wrong.checks]
    if not findings:
        return [f"no finding of {' or '.join(wrong.checks)}, but of {[finding.check for finding in report.findings]}"]
    best: list[str] = min((_complaints_of(finding, wrong) for finding in findings), key=len)
    blamed = {name for finding in findings for name in _names(finding)}
    if wrong.every_name and blamed != wrong.every_name:
        best = [
            *best,
            f"blamed {sorted(blamed - wrong.every_name)}, missed {sorted(wrong.every_name - blamed)}",
        ]
    return best


def _complaints_of(finding: Any, wrong: Wrong) -> list[str]:
    said = []
    place = str(finding.where.get("parameter") or finding.where.get("module") or "")
    if not any(fnmatchcase(place, pattern) for pattern in wrong.names):
        said.append(f"found at {place!r}, not at {' or '.join(wrong.names)}")
    if wrong.cause is not None and finding.cause != wrong.cause:
        said.append(f"cause {finding.cause}, not {wrong.cause}")
    if wrong.ranks is not None and tuple(finding.where.get("ranks", ())) != wrong.ranks:
        said.append(f"on ranks {finding.where.get('ranks')}, not {wrong.ranks}")
    if wrong.step is not None and finding.where.get("step") != wrong.step:
        said.append(f"at step {finding.where.get('step')}, not {wrong.step}")
    text = f"{dict(finding.where)} {dict(finding.evidence)}"
    said += [f"no {word!r} in {text}" for word in wrong.evidence if word not in text]
    return said


def _names(finding: Any) -> list[str]:
    place = finding.where.get("parameter") or finding.where.get("module") or ""
    also = [name if isinstance(name, str) else name["name"] for name in finding.evidence.get("also", ())]
    return [str(place), *also]
