"""What came of one try of a layer: every tensor held against what rounding may do to it."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tpcheck.core.causes import Cause
from tpcheck.lab.fuzz.results import MAKING, Outcome, Trial
from tpcheck.lab.known import layer_register
from tpcheck.numerics.tolerance import NUM_REPLAYS, Tolerance
from tpcheck.report import words

if TYPE_CHECKING:
    import torch

    from tpcheck.lab.fuzz.layer_trial import RankTrial, TriedTensor

# What somebody raises who says that he cannot; who stumbles raises anything else, and later.
REFUSALS = ("AssertionError", "NotImplementedError", "ValueError")
TELLING = 60  # letters of a message that tell one crash from another


def in_general(message: str) -> str:
    """Return a message's first line without its numbers, by which those of one kind are counted together.

    Example:
        >>> in_general("shape [3, 4] is invalid\\n at line 7")
        'shape [N, N] is invalid'
    """
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return re.sub(r"\d+", "N", line)


class Asked(Protocol):
    """What the judgement depends on beside the try."""

    @property
    def backend_name(self) -> str: ...

    @property
    def known(self) -> bool: ...


def judged_trial(
    trial: Trial, by_rank: Sequence[RankTrial], asked: Asked, versions: Mapping[str, str], command: str
) -> Outcome:
    """Return how a try ended that no layer raised in: by the first tensor that is wrong on any rank."""
    if uneven := _not_held_once(by_rank):
        return Outcome("refused", reason=uneven, command=command)
    for name in by_rank[0].tensors:
        tensors = [one.tensors[name] for one in by_rank]
        margins = [_margin(tensor) for tensor in tensors]
        if max(margins) > 1:
            return _failed(trial, name, tensors, margins, asked, versions, command)
    return Outcome("passed", command=command)


def _failed(
    trial: Trial,
    name: str,
    tensors: Sequence[TriedTensor],
    margins: Sequence[float],
    asked: Asked,
    versions: Mapping[str, str],
    command: str,
) -> Outcome:
    for bug in layer_register() if asked.known else ():
        if bug.explains(trial, asked.backend_name, versions, verdict="failed", tensor=name):
            return Outcome("known", bug.name, bug.what, command)
    cause = _cause(tensors)
    worst = max(range(len(margins)), key=margins.__getitem__)
    data: dict[str, Any] = {
        "tensor": name,
        "ranks": [rank for rank, margin in enumerate(margins) if margin > 1],
        "observed": _relative(tensors[worst], _error(tensors[worst])),
        "allowed": _relative(tensors[worst], _allowed(tensors[worst])),
        "margin": margins[worst],
        "cause": cause,
    }
    said = f"{trial.layer}: {name} is off by {words.error(data['observed'])} on ranks {data['ranks']}"
    return Outcome("failed", f"{trial.layer} {name}", said + (f"; {cause}" if cause else ""), command, data)


def crashed_trial(trial: Trial, said: str, asked: Asked, versions: Mapping[str, str], command: str) -> Outcome:
    """Return what a crash is: known, a refusal that says so, or a finding."""
    for bug in layer_register() if asked.known else ():
        if bug.explains(trial, asked.backend_name, versions, verdict="error", message=said):
            return Outcome("known", bug.name, bug.what, command)
    line = next(iter(said.strip().splitlines()), "")
    phase, _, rest = line.removeprefix(f"{trial.layer}, ").partition(": ")
    if phase == MAKING and rest.partition(": ")[0] in REFUSALS:
        return Outcome("refused", reason=in_general(line), command=command)
    return Outcome(
        "error", f"{trial.layer} {in_general(f'{phase} {rest}')[:TELLING]}", line, command, {"message": said}
    )


def _not_held_once(by_rank: Sequence[RankTrial]) -> str:
    """Return why gradients of parts would not add up to the whole's: some ranks hold the same part of a weight."""
    import torch

    held = torch.cat([one.held["weight"].reshape(-1) for one in by_rank])
    return "" if len(set(held.tolist())) == len(held) else "several ranks hold the same part of the weight"


def _margin(tensor: TriedTensor) -> float:
    error = _error(tensor)
    return error / _allowed(tensor) if error else 0.0


def _error(tensor: TriedTensor) -> float:
    from tpcheck.numerics.differences import frobenius_distance

    return frobenius_distance(tensor.actual, tensor.expected)


def _allowed(tensor: TriedTensor) -> float:
    import torch

    from tpcheck.numerics.differences import rounding_error

    smallest = torch.finfo(tensor.expected.dtype).tiny  # what should be nothing may be denormal
    deviations: dict[Hashable, float] = {"tensor": tensor.deviation}
    return max(Tolerance(0.0, NUM_REPLAYS, deviations).allowed("tensor", rounding_error(tensor.expected)), smallest)


def _relative(tensor: TriedTensor, error: float) -> float:
    from tpcheck.numerics.differences import frobenius

    norm = frobenius(tensor.expected)
    return error / norm if norm else error


def _cause(tensors: Sequence[TriedTensor]) -> str | None:
    """Return what explains a tensor that should be whole on each rank: a sum left out, or made twice."""
    expected = tensors[0].expected
    if not _same(tensors):
        return None
    tolerance = len(tensors) * max(_allowed(tensor) for tensor in tensors)

    def near(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
        return bool((actual.double() - wanted.double()).norm() <= tolerance)

    if near(sum(tensor.actual.double() for tensor in tensors), expected):  # type: ignore[arg-type]
        return Cause.MISSING_REDUCE.slug
    if all(near(tensor.actual, expected * len(tensors)) for tensor in tensors):
        return Cause.DUPLICATE_REDUCE.slug
    return None


def _same(tensors: Sequence[TriedTensor]) -> bool:
    import torch

    first = tensors[0]
    same_expected = all(torch.equal(tensor.expected, first.expected) for tensor in tensors)
    return same_expected and all(tensor.actual.shape == first.expected.shape for tensor in tensors)
