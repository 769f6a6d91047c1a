"""Compares one tensor of every parameter (weight, gradient, updated weight) with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.numerics.checks.suspects import tensor_suspect
from tpcheck.numerics.differences import Difference, compare_parameter
from tpcheck.numerics.evidence import Evidence, Kind, Suspect


@dataclass(frozen=True, slots=True)
class ComparedParameter:
    """One parameter's tensor on both sides, and how far they are apart."""

    name: str
    expected: Any
    parts: tuple[Any, ...]
    expected_parts: tuple[Any, ...]
    found: Difference

    @property
    def module(self) -> str:
        """Name of the module that owns the parameter."""
        return self.name.rpartition(".")[0]


def parameter_suspect(
    evidence: Evidence,
    one: ComparedParameter,
    *,
    check: str,
    kind: Kind,
    where: Mapping[str, Any],
    details: Mapping[str, Any],
) -> Suspect:
    """Return the suspect for one parameter's tensor; `where` says when, beside the parameter and its module."""
    return tensor_suspect(
        evidence,
        one.found,
        check=check,
        kind=kind,
        where={**where, "module": one.module, "parameter": one.name},
        expected=one.expected,
        parts=one.parts,
        expected_parts=one.expected_parts,
        replicated=evidence.layouts[one.name].is_replicated,
        details=details,
    )


def compare_parameters(
    evidence: Evidence,
    expected: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    allowed: Callable[[str, Any], float],
) -> tuple[dict[str, ComparedParameter], dict[str, str]]:
    """Return what could be compared, and why the rest could not, by parameter name.

    Args:
        expected: The reference's tensors; None stands for zeros (no gradient).
        parts: Each rank's tensors, by tp_rank; None likewise.
        allowed: Gives the largest Frobenius error that passes for a name and its expected tensor.
    """
    compared: dict[str, ComparedParameter] = {}
    missed: dict[str, str] = {}
    for name, whole in expected.items():
        layout = evidence.layouts.get(name)
        if any(name not in part for part in parts):
            missed[name] = "the sharded model has no parameter of this name"
            continue
        if layout is None:
            missed[name] = "its layer cannot gather it, so nobody can say which part each rank holds"
            continue
        own = [part[name] for part in parts]
        if whole is None and all(part is None for part in own):
            continue  # no gradient on either side
        like = evidence.initial_parts
        filled = tuple(like[tp][name].new_zeros(like[tp][name].shape) if p is None else p for tp, p in enumerate(own))
        target = evidence.initial[name].new_zeros(evidence.initial[name].shape) if whole is None else whole
        fits = tuple(target.shape) == tuple(layout.shape)
        expected_parts = tuple(layout.local(target, tp) for tp in range(len(own))) if fits else ()
        found = compare_parameter(layout, target, filled, allowed(name, target))
        compared[name] = ComparedParameter(name, target, filled, expected_parts, found)
    return compared, missed
