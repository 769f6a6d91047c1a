"""The outcome of one trial of a layer: every tensor compared with the plain layer's, within measured rounding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tpcheck.lab.fuzz.results import INPUT_GRADIENT, MAKING, OUTPUT, Outcome, Trial
from tpcheck.lab.known import layer_register
from tpcheck.report import words

if TYPE_CHECKING:
    from tpcheck.lab.fuzz.layer_trial import RankTrial, TriedTensor
    from tpcheck.numerics.differences import Difference

# The exceptions of a deliberate refusal; any other exception is a crash.
REFUSALS = ("AssertionError", "NotImplementedError", "ValueError")
TELLING = 60  # characters of a message that tell one crash from another


def in_general(message: str) -> str:
    """Return the first line of a message with its numbers replaced by N, to count similar messages together.

    Example:
        >>> in_general("shape [3, 4] is invalid\\n at line 7")
        'shape [N, N] is invalid'
    """
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return re.sub(r"\d+", "N", line)


class TrialOptions(Protocol):
    """The options that the outcome of a trial depends on."""

    @property
    def backend_name(self) -> str: ...

    @property
    def known(self) -> bool: ...


def judged_trial(
    trial: Trial, by_rank: Sequence[RankTrial], options: TrialOptions, versions: Mapping[str, str], command: str
) -> Outcome:
    """Return the outcome of a trial without a crash: the first tensor that is wrong on any rank decides."""
    import torch

    positions = torch.cat([rank.local_positions["weight"].reshape(-1) for rank in by_rank])
    if len(set(positions.tolist())) < len(positions):  # the gradients of the parts would not add up to the whole's
        return Outcome("refused", reason="several ranks hold the same part of the weight", command=command)
    for name in by_rank[0].tensors:
        tensors = [rank.tensors[name] for rank in by_rank]
        differences = [_difference(tensor) for tensor in tensors]
        if not all(difference.agrees for difference in differences):
            return _failed(trial, name, tensors, differences, options, versions, command)
    return Outcome("passed", command=command)


def _failed(
    trial: Trial,
    name: str,
    tensors: Sequence[TriedTensor],
    differences: Sequence[Difference],
    options: TrialOptions,
    versions: Mapping[str, str],
    command: str,
) -> Outcome:
    for bug in layer_register() if options.known else ():
        if bug.explains(trial, options.backend_name, versions, verdict="failed", tensor=name):
            return Outcome("known", bug.name, bug.what, command)
    worst = max(differences, key=lambda difference: difference.margin)
    data: dict[str, Any] = {
        "tensor": name,
        "ranks": [rank for rank, difference in enumerate(differences) if not difference.agrees],
        "observed": worst.relative,
        "allowed": worst.relative_allowed,
        "margin": worst.margin,
        "cause": _cause(name, tensors, worst),
    }
    reason = f"{trial.layer}: {name} has a relative error of {words.error(data['observed'])}"
    reason += f" on {words.ranks(data['ranks'])}" + (f"; {data['cause']}" if data["cause"] else "")
    return Outcome("failed", f"{trial.layer} {name}", reason, command, data)


def crashed_trial(
    trial: Trial, message: str, options: TrialOptions, versions: Mapping[str, str], command: str
) -> Outcome:
    """Return the outcome of a trial in which a layer raised: a known bug, a refusal, or a finding."""
    for bug in layer_register() if options.known else ():
        if bug.explains(trial, options.backend_name, versions, verdict="error", message=message):
            return Outcome("known", bug.name, bug.what, command)
    line = next(iter(message.strip().splitlines()), "")
    phase, _, rest = line.removeprefix(f"{trial.layer}, ").partition(": ")
    if phase == MAKING and rest.partition(": ")[0] in REFUSALS:
        return Outcome("refused", reason=in_general(line), command=command)
    kind = f"{trial.layer} {in_general(f'{phase} {rest}')[:TELLING]}"
    return Outcome("error", kind, line, command, {"message": message})


def _difference(tensor: TriedTensor) -> Difference:
    from tpcheck.numerics.activation_placement import infer_placement
    from tpcheck.numerics.differences import Difference, compare_placed

    placed = infer_placement(tensor.expected.shape, [tensor.actual])
    if placed is None:
        return Difference.unbounded(tensor.expected, tensor.allowed, 1)
    return compare_placed(placed, tensor.expected, tensor.allowed)


def _cause(name: str, tensors: Sequence[TriedTensor], worst: Difference) -> str | None:
    """Return the cause whose test holds on the tensors of all ranks; None for tensors of wrong shapes."""
    import torch

    from tpcheck.numerics.evidence import Kind, Suspect
    from tpcheck.numerics.hypotheses import explain

    if any(tensor.actual.shape != tensor.expected.shape for tensor in tensors):
        return None
    kinds: Mapping[str, Kind] = {OUTPUT: "activation", INPUT_GRADIENT: "input_gradient"}
    whole = tensors[0].expected
    is_replicated = all(torch.equal(tensor.expected, whole) for tensor in tensors)
    explanation = explain(
        Suspect(
            check="",
            where={},
            role="input" if name == INPUT_GRADIENT else "output" if name == OUTPUT else None,
            observed=worst.relative,
            allowed=worst.relative_allowed,
            kind=kinds.get(name, "gradient"),
            expected=whole if is_replicated else None,
            actual_parts=tuple(tensor.actual for tensor in tensors),
            expected_parts=tuple(tensor.expected for tensor in tensors),
            is_replicated=is_replicated,
            allowed_error=max(tensor.allowed for tensor in tensors),
        )
    )
    return None if explanation is None else explanation.cause.slug
