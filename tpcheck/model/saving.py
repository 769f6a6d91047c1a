"""Saves the sharded model in each public way of the backend, reads it back, and compares it with the reference."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.backends.interface import Candidate, SavesCheckpoints
from tpcheck.checkpoints.comparison import compare_checkpoints, open_checkpoint
from tpcheck.core.environment import WORLD_FOLDER_VARIABLE
from tpcheck.core.errors import TpcheckError
from tpcheck.core.findings import Finding
from tpcheck.core.phases import begin_phase
from tpcheck.model.reference import CommunicatingRank
from tpcheck.numerics.checks import CHECKPOINT_CHECK
from tpcheck.numerics.evidence import Evidence
from tpcheck.numerics.tensors import restore_buffers
from tpcheck.numerics.verdict import CheckAnswer, GroupAnswer

Save = Callable[[Path], None]


def verify_saved(
    rank: CommunicatingRank, candidate: Candidate, expected: nn.Module, *, step: int, unknown: Sequence[str] = ()
) -> CheckAnswer | None:
    """Save in every public way and compare each result with `expected`.

    Collective. Returns the answer on the first rank of the world, None on the others.

    Args:
        expected: The unsharded model with the weights that should be saved; read on the first rank alone.
        step: The last step that was trained; -1 before the first.
        unknown: Names of tensors of `expected` whose right values are unknown, so that they are not compared.
    """
    if not isinstance(candidate, SavesCheckpoints):
        missed = {"the saved model": "the backend offers no way to save it"}
        return CheckAnswer(CHECKPOINT_CHECK, step, {}, (), missed) if rank.rank == 0 else None
    answer = CheckAnswer(CHECKPOINT_CHECK, step, {}, (), {})
    with _shared_folder(rank) as folder:
        for number, (way, save) in enumerate(candidate.ways_to_save().items()):
            target = folder / str(number)
            moment = "before the first step" if step < 0 else f"after step {step}"
            begin_phase(f"{CHECKPOINT_CHECK}: {way}, {moment}", rank.rank)
            failures = [failure.replace(str(target), "FOLDER") for failure in _save(rank, save, target)]
            if rank.rank == 0:
                answer = _add_way(answer, way, target, expected, failures)
                shutil.rmtree(target)
    return _without(answer, unknown) if rank.rank == 0 else None


def load_gathered(model: nn.Module, evidence: Evidence) -> tuple[str, ...]:
    """Load the sharded model's present weights and buffers into the unsharded one; return names that are not gathered.

    `updates_match_reference` decides whether these weights are right; what is saved must be bitwise equal to them.
    """
    ranks = evidence.candidate[-1]
    not_gathered = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layout = evidence.layouts.get(name)
            if layout is None or any(name not in step.weights for step in ranks):
                not_gathered.append(name)
            else:
                parameter.copy_(layout.assemble([step.weights[name] for step in ranks]))
    buffers = dict(model.named_buffers())
    restore_buffers(model, {name: buffer for name, buffer in ranks[0].buffers.items() if name in buffers})
    return tuple(not_gathered)


def add_saved(answer: GroupAnswer | None, saved: Sequence[CheckAnswer | None]) -> GroupAnswer | None:
    """Add the answers about saved models to the answer of the group whose first rank read them."""
    present = [check for check in saved if check is not None]
    if answer is None or not present:
        return answer
    # a step that differs ends the comparison of steps, not that of what is saved
    checks = [replace(check, step=min(check.step, answer.last_step)) for check in present]
    return replace(answer, answers=(*answer.answers, *checks))


def _without(answer: CheckAnswer, unknown: Sequence[str]) -> CheckAnswer:
    """Count findings about these tensors as missed comparisons."""
    dropped = [finding for finding in answer.findings if finding.where["parameter"] in unknown]
    missed = {
        f"{finding.where['field']}: {finding.where['parameter']}": "its layer cannot gather it" for finding in dropped
    }
    findings = tuple(finding for finding in answer.findings if finding not in dropped)
    return replace(answer, findings=findings, not_compared={**answer.not_compared, **missed})


@contextmanager
def _shared_folder(rank: CommunicatingRank) -> Iterator[Path]:
    """Make a folder that every rank on this machine writes to; remove it when the last rank is done."""
    within = os.environ.get(WORLD_FOLDER_VARIABLE)  # ranks may be ended without finalizers
    created = tempfile.mkdtemp(prefix="tpcheck-saved-", dir=within) if rank.rank == 0 else None
    folder = Path(rank.gather(created)[0])
    try:
        yield folder
    finally:
        if created is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _save(rank: CommunicatingRank, save: Save, folder: Path) -> tuple[str, ...]:
    """Save into a new folder, and return the errors that ranks raised, each once."""
    if rank.rank == 0:
        folder.mkdir()
    rank.gather(None)
    failure = None
    try:
        save(folder)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return tuple(dict.fromkeys(error for error in rank.gather(failure) if error is not None))


def _add_way(answer: CheckAnswer, way: str, folder: Path, expected: nn.Module, failures: Sequence[str]) -> CheckAnswer:
    """Add the comparison of what one way to save wrote."""
    if failures:
        return replace(answer, not_compared={**answer.not_compared, way: f"it raises {'; '.join(failures)}"})
    if not any(folder.iterdir()):
        return replace(answer, not_compared={**answer.not_compared, way: "it wrote nothing"})
    try:
        universal = folder / "universal"  # a conversion leaves its source beside it
        findings, margins, missed = _compare(universal if universal.is_dir() else folder, expected)
    except TpcheckError as error:
        return replace(answer, not_compared={**answer.not_compared, way: f"what it wrote cannot be read: {error}"})
    phase: dict[str, Any] = {"phase": "start"} if answer.step < 0 else {"phase": "saved", "step": answer.step}
    placed = tuple(replace(finding, where={**phase, "field": way, **finding.where}) for finding in findings)
    return replace(
        answer,
        margins={**answer.margins, **{f"{way}: {name}": margin for name, margin in margins.items()}},
        findings=(*answer.findings, *placed),
        not_compared={**answer.not_compared, **{f"{way}: {name}": reason for name, reason in missed.items()}},
    )


def _compare(folder: Path, expected: nn.Module) -> tuple[tuple[Finding, ...], Mapping[str, float], Mapping[str, str]]:
    """Compare bitwise. Master weights of a higher precision are rounded to the model's dtype first."""
    dtype = next(parameter.dtype for parameter in expected.parameters())
    reference = open_checkpoint("reference", expected, ReadOptions())
    actual = open_checkpoint("actual", folder, ReadOptions())
    try:
        saved = [actual.dtype(name) for name in actual.names()]
        has_masters = any(each.is_floating_point and each.itemsize > dtype.itemsize for each in saved)
        comparison = compare_checkpoints(actual, reference, actual_cast=dtype if has_masters else None)
        wrong = {finding.where["parameter"] for finding in comparison.findings}
        margins = {name: inf if name in wrong else 0.0 for name in comparison.names}
    finally:
        actual.close()
        reference.close()
    return comparison.findings, margins, comparison.coverage.not_compared
