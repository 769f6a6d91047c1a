"""Compares a tensor of every parameter with the reference's, and turns the difference of any tensor into a suspect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from sys import float_info
from typing import Any

from tpcheck.numerics.differences import Difference, compare_parameter
from tpcheck.numerics.evidence import LOGGED_LOSS, CheckOutcome, Evidence, Kind, LossFacts, Suspect


def tensor_suspect(
    evidence: Evidence,
    difference: Difference,
    *,
    check: str,
    kind: Kind,
    where: Mapping[str, Any],
    expected: Any,
    actual_parts: Sequence[Any],
    expected_parts: Sequence[Any],
    is_replicated: bool,
    details: Mapping[str, Any] | None = None,
    cut: Callable[[Any], Sequence[Any]] | None = None,
) -> Suspect:
    """Return the suspect for a calibrated or exact comparison of one tensor.

    Exact comparisons (nothing allowed) count the elements that differ, calibrated ones give a relative error.
    """
    is_exact = difference.allowed == 0
    where = {**where, "ranks": evidence.ranks(difference.wrong_tp_ranks())}
    if evidence.topology.dp > 1:
        where["dp_rank"] = evidence.dp_rank
    numbers: dict[str, Any] = {
        "largest": difference.largest,
        "largest_at": list(difference.largest_at),
        "dtype": evidence.dtype,
    }
    if is_exact:
        numbers |= {"count_differing": difference.count_differing, "count_total": expected.numel()}
    else:
        numbers |= {"replays": evidence.tolerance.num_replays}
    return Suspect(
        check=check,
        kind=kind,
        where=where,
        observed=float(difference.count_differing) if is_exact else difference.relative,
        allowed=0.0 if is_exact else difference.relative_allowed,
        evidence={**numbers, **(details or {})},
        expected=expected,
        actual_parts=tuple(actual_parts),
        expected_parts=tuple(expected_parts),
        is_replicated=is_replicated,
        allowed_error=difference.allowed,
        num_replicas=evidence.topology.dp,
        cut=cut or (partial(_on_every_rank, tp=len(actual_parts)) if is_replicated else None),
        tp_group=evidence.tp_group,
    )


def _on_every_rank(full: Any, tp: int) -> tuple[Any, ...]:
    return (full,) * tp


def compare_scalar(
    evidence: Evidence,
    name: str,
    actual: Sequence[float],
    expected: float,
    allowed: float,
    *,
    check: str,
    kind: Kind,
    where: Mapping[str, Any],
) -> tuple[float, Suspect | None]:
    """Return the margin of a number that every rank has, such as the loss, and the suspect where it is wrong.

    Args:
        name: Its name in the evidence of the suspect.
    """
    errors = [abs(number - expected) if number == number else inf for number in actual]
    margin = max(errors) / allowed if allowed else (inf if max(errors) else 0.0)
    if max(errors) <= allowed:
        return margin, None
    wrong = tuple(tp_rank for tp_rank, error in enumerate(errors) if error > allowed)
    size = abs(expected) or 1.0
    suspect = Suspect(
        check=check,
        kind=kind,
        where={**where, "ranks": evidence.ranks(wrong)},
        observed=max(errors) / size,
        allowed=allowed / size,
        evidence={
            f"{name}_actual": list(actual),
            f"{name}_expected": expected,
            "dtype": evidence.dtype,
            "replays": evidence.tolerance.num_replays,
        },
        expected=expected,
        actual_parts=tuple(actual),
        is_replicated=True,
        allowed_error=allowed,
    )
    return margin, suspect


@dataclass(frozen=True, slots=True)
class ComparedParameter:
    """One tensor of a parameter on both sides, with its difference."""

    name: str
    expected: Any
    actual_parts: tuple[Any, ...]
    expected_parts: tuple[Any, ...]
    difference: Difference

    @property
    def module(self) -> str:
        """Name of the module that has the parameter."""
        return self.name.rpartition(".")[0]


def parameter_suspect(
    evidence: Evidence,
    parameter: ComparedParameter,
    *,
    check: str,
    kind: Kind,
    where: Mapping[str, Any],
    details: Mapping[str, Any],
) -> Suspect:
    """Return the suspect for one parameter's tensor; `where` has the phase and the step."""
    return tensor_suspect(
        evidence,
        parameter.difference,
        check=check,
        kind=kind,
        where={**where, "module": parameter.module, "parameter": parameter.name},
        expected=parameter.expected,
        actual_parts=parameter.actual_parts,
        expected_parts=parameter.expected_parts,
        is_replicated=evidence.layouts[parameter.name].is_replicated,
        details=details,
        cut=evidence.layouts[parameter.name].parts if parameter.expected_parts else None,
    )


def compare_parameters(
    evidence: Evidence,
    expected: Mapping[str, Any],
    actual: Sequence[Mapping[str, Any]],
    allowed: Callable[[str, Any], float],
) -> tuple[dict[str, ComparedParameter], dict[str, str]]:
    """Return the comparisons, and why the other parameters could not be compared, by name.

    Args:
        expected: The reference's tensors; None stands for zeros (no gradient).
        actual: Each rank's tensors, by tp_rank; None likewise.
        allowed: Gives the largest Frobenius error that passes for a name and its expected tensor.
    """
    compared: dict[str, ComparedParameter] = {}
    not_compared: dict[str, str] = {}
    for name, expected_tensor in expected.items():
        layout = evidence.layouts.get(name)
        if any(name not in tensors for tensors in actual):
            not_compared[name] = "the sharded model has no parameter of this name"
            continue
        if layout is None:
            not_compared[name] = "its layer cannot gather it, so which part each rank holds is unknown"
            continue
        parts = [tensors[name] for tensors in actual]
        if expected_tensor is None and all(part is None for part in parts):
            continue  # no gradient on either side
        actual_parts = tuple(
            initial_parts[name].new_zeros(initial_parts[name].shape) if part is None else part
            for part, initial_parts in zip(parts, evidence.initial_parts, strict=True)
        )
        initial = evidence.initial[name]
        expected_or_zeros = initial.new_zeros(initial.shape) if expected_tensor is None else expected_tensor
        expected_parts: tuple[Any, ...] = ()
        if tuple(expected_or_zeros.shape) == tuple(layout.shape):
            expected_parts = layout.parts(expected_or_zeros)
        difference = compare_parameter(layout, expected_or_zeros, actual_parts, allowed(name, expected_or_zeros))
        compared[name] = ComparedParameter(name, expected_or_zeros, actual_parts, expected_parts, difference)
    return compared, not_compared


def compare_logged(evidence: Evidence, step: int, names: Mapping[str, str], *, check: str, phase: str) -> CheckOutcome:
    """Compare what the loop of a library logs of `step`, on every rank, with what it would log of the reference.

    Args:
        names: What is compared: the names of the log, and what each is.
    """
    margins, suspects, not_compared = {}, [], {}
    for name, what in names.items():
        expected = evidence.reference[step].logged.get(name)
        if expected is None:
            continue
        actual = [rank.logged.get(name) for rank in evidence.candidate[step]]
        known = [value for value in actual if value is not None]
        if len(known) < len(actual):
            not_compared[what] = "the Trainer does not log it"
            continue
        allowed = (
            evidence.tolerance.allowed_scalar((step, "logged", name), expected) or float_info.min
        )  # of a rate of 0
        where = {"phase": phase, "step": step, "field": what}
        margins[what], suspect = compare_scalar(
            evidence, "logged", known, expected, allowed, check=check, kind="logged", where=where
        )
        if suspect is not None:
            loss = evidence.reference[step].loss
            of_replica = LossFacts(loss, tuple(rank.loss for rank in evidence.candidate[step]))
            suspects.append(replace(suspect, loss=of_replica if name == LOGGED_LOSS else None))
    return CheckOutcome(margins, tuple(suspects), not_compared)


DECAYED_OR_NOT = "it has no gradient, and optimizers differ in whether they decay it"


def may_be_decayed_or_not(evidence: Evidence, step: int, name: str) -> bool:
    """Return whether no gradient of a trained parameter reached a step that was taken, on any rank or in the reference.

    An optimizer of flat masters decays such a parameter, one that skips parameters without a gradient does not.
    """
    if evidence.reference[step].is_skipped or name in evidence.frozen:
        return False
    if evidence.reference[step].gradients[name] is not None:
        return False
    gradients = [rank.gradients[name] for rank in evidence.candidate[step]]
    return not any(gradient is not None and bool(gradient.any()) for gradient in gradients)
