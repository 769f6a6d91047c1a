"""Saves the sharded model through each public way, reads it back, and compares it with what it should be."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.backends.interface import Candidate, RankLike, SavesCheckpoints
from tpcheck.checkpoints.comparison import compare_checkpoints, open_checkpoint
from tpcheck.core.errors import TpcheckError
from tpcheck.core.findings import Finding
from tpcheck.numerics.answer import CheckAnswer, GroupAnswer
from tpcheck.numerics.checks import CHECKPOINT_CHECK
from tpcheck.numerics.evidence import Evidence
from tpcheck.numerics.snapshots import set_buffers

Save = Callable[[Path], None]


class GatheringRank(RankLike, Protocol):
    """A rank that can exchange objects with all others."""

    def gather(self, value: Any) -> tuple[Any, ...]: ...


def saved_answer(
    rank: GatheringRank, candidate: Candidate, expected: nn.Module, *, step: int, unknown: Sequence[str] = ()
) -> CheckAnswer | None:
    """Return what came of every way to save, on the first rank of the world; None on the others. Collective.

    Args:
        expected: The unsharded model with the weights that should be saved; read on the first rank alone.
        step: The last step that was trained; -1 before the first.
        unknown: Names of tensors of `expected` that may be anything, so that what was saved cannot be judged.
    """
    if not isinstance(candidate, SavesCheckpoints):
        missed = {"the saved model": "the backend tells no way to save it"}
        return CheckAnswer(CHECKPOINT_CHECK, step, {}, (), missed) if rank.rank == 0 else None
    answer = CheckAnswer(CHECKPOINT_CHECK, step, {}, (), {})
    with _shared_folder(rank) as folder:
        for number, (way, save) in enumerate(candidate.ways_to_save().items()):
            own = folder / str(number)
            failures = [failure.replace(str(own), "FOLDER") for failure in _saved(rank, save, own)]
            if rank.rank == 0:
                answer = _with_way(answer, way, own, expected, failures)
                shutil.rmtree(own)
    return _without(answer, unknown) if rank.rank == 0 else None


def set_gathered(model: nn.Module, evidence: Evidence) -> tuple[str, ...]:
    """Give the unsharded model the weights and buffers that the sharded one has now; return what nobody can gather.

    `updates_match_reference` tells whether these weights are right; what is saved must be these to the bit.
    """
    ranks = evidence.candidate[-1]
    unknown = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layout = evidence.layouts.get(name)
            if layout is None or any(name not in one.weights for one in ranks):
                unknown.append(name)
            else:
                parameter.copy_(layout.assemble([one.weights[name] for one in ranks]))
    set_buffers(
        model, {name: buffer for name, buffer in ranks[0].buffers.items() if name in dict(model.named_buffers())}
    )
    return tuple(unknown)


def with_saved(answer: GroupAnswer | None, saved: Sequence[CheckAnswer | None]) -> GroupAnswer | None:
    """Add what came of saving to the answer of the group whose first rank looked into it."""
    found = [one for one in saved if one is not None]
    if answer is None or not found:
        return answer
    # a step that differs ends the comparison of steps, not that of what is saved
    return replace(
        answer, answers=(*answer.answers, *(replace(one, step=min(one.step, answer.last_step)) for one in found))
    )


def _without(answer: CheckAnswer, unknown: Sequence[str]) -> CheckAnswer:
    told = [finding for finding in answer.findings if finding.where["parameter"] in unknown]
    missed = {f"{one.where['field']}: {one.where['parameter']}": "its layer cannot gather it" for one in told}
    findings = tuple(finding for finding in answer.findings if finding not in told)
    return replace(answer, findings=findings, not_compared={**answer.not_compared, **missed})


@contextmanager
def _shared_folder(rank: GatheringRank) -> Iterator[Path]:
    """Make a folder that every rank on this machine writes to; it is removed when the last one is done."""
    made = tempfile.mkdtemp(prefix="tpcheck-saved-") if rank.rank == 0 else None
    folder = Path(rank.gather(made)[0])
    try:
        yield folder
    finally:
        if made is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _saved(rank: GatheringRank, save: Save, folder: Path) -> tuple[str, ...]:
    """Save into a folder of its own, and return what the ranks said that could not."""
    if rank.rank == 0:
        folder.mkdir()
    rank.gather(None)
    failure = None
    try:
        save(folder)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return tuple(dict.fromkeys(one for one in rank.gather(failure) if one is not None))


def _with_way(answer: CheckAnswer, way: str, folder: Path, expected: nn.Module, failures: Sequence[str]) -> CheckAnswer:
    """Add what was read back from one folder."""
    if failures:
        return replace(answer, not_compared={**answer.not_compared, way: f"it raises {'; '.join(failures)}"})
    if not any(folder.iterdir()):
        return replace(answer, not_compared={**answer.not_compared, way: "it wrote nothing"})
    try:
        findings, margins, missed = _compared(_checkpoint_in(folder), expected)
    except TpcheckError as error:
        return replace(answer, not_compared={**answer.not_compared, way: f"what it wrote cannot be read: {error}"})
    phase: dict[str, Any] = {"phase": "start"} if answer.step < 0 else {"phase": "saved", "step": answer.step}
    told = tuple(replace(one, where={**phase, "field": way, **one.where}) for one in findings)
    return replace(
        answer,
        margins={**answer.margins, **{f"{way}: {name}": margin for name, margin in margins.items()}},
        findings=(*answer.findings, *told),
        not_compared={**answer.not_compared, **{f"{way}: {name}": why for name, why in missed.items()}},
    )


def _checkpoint_in(folder: Path) -> Path:
    """Return where the checkpoint lies: a conversion leaves its source beside it."""
    universal = folder / "universal"
    return universal if universal.is_dir() else folder


def _compared(folder: Path, expected: nn.Module) -> tuple[tuple[Finding, ...], Mapping[str, float], Mapping[str, str]]:
    """Compare to the bit. Master weights of a higher precision are rounded to the model's own dtype first."""
    own = next(parameter.dtype for parameter in expected.parameters())
    reference = open_checkpoint("reference", expected, ReadOptions())
    actual = open_checkpoint("actual", folder, ReadOptions())
    try:
        is_wider = any(_is_wider(actual.dtype(name), own) for name in actual.names())  # master weights
        comparison = compare_checkpoints(actual, reference, actual_cast=own if is_wider else None)
        wrong = {one.where["parameter"] for one in comparison.findings}
        margins = {name: inf if name in wrong else 0.0 for name in reference.names()}
    finally:
        actual.close()
        reference.close()
    return comparison.findings, margins, comparison.coverage.not_compared


def _is_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > than.itemsize
