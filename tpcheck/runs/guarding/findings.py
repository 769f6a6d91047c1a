"""The findings of `guard`: what differs between ranks that should hold the same, since when, and what is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.findings import Finding
from tpcheck.runs.comparing.run_findings import BATCHES, REPLICAS, exact_finding
from tpcheck.runs.guarding.replica_digests import Difference, Label

FINITE = "gradients_are_finite"

BATCH, OPTION, STEPS, SKIPPED, LOSS_SCALE, NORM = (
    "input", "option", "optimizer steps", "skipped steps", "loss scale", "gradient norm",
)  # fmt: skip
# What each of these is wrong by explains what is wrong with those after it.
_NUMBERS = (STEPS, SKIPPED, OPTION, LOSS_SCALE, NORM)
TENSORS = ("weight", "buffer", "master", "state", "gradient")
_OPTION_NAMES = {"lr": "learning rate"}


@dataclass(frozen=True, slots=True)
class NotFinite:
    """A gradient with infinite or NaN elements.

    Attributes:
        name: Of the parameter.
        rank: Which rank has it.
    """

    name: str
    rank: int


def findings_of(found: Sequence[Difference], not_finite: Iterable[NotFinite], step: int) -> tuple[Finding, ...]:
    """Return the findings of one check, those first that explain others.

    Args:
        found: Of the whole grid of ranks, in the order of the model.
        not_finite: Of the whole grid.
        step: Optimizer steps taken before the check.
    """
    by_kind: dict[str, list[Difference]] = {}
    for difference in found:
        by_kind.setdefault(difference.label[0], []).append(difference)
    findings = [*_batch_finding(by_kind.get(BATCH, []), step)]
    findings += [_number_finding(difference, step) for kind in _NUMBERS for difference in by_kind.get(kind, ())]
    findings += _not_finite_finding(list(not_finite), step)
    by_ranks: dict[tuple[int, ...], list[Difference]] = {}
    for kind in TENSORS:
        for difference in by_kind.get(kind, ()):
            by_ranks.setdefault(difference.ranks, []).append(difference)
    findings += [_tensors_finding(of_ranks, ranks, step) for ranks, of_ranks in by_ranks.items()]
    return tuple(findings)


def described(label: Label) -> str:
    """Return the label in words.

    Example:
        >>> described(("state", "norm.weight", "exp_avg")), described(("option", "lr", "1"))
        ('exp_avg of norm.weight', 'learning rate of parameter group 1')
    """
    kind, name, index = label
    if kind == OPTION:
        return f"{_OPTION_NAMES.get(name, name)} of parameter group {index}"
    if kind == "state":
        return f"{index} of {name}"
    return f"{kind} {name}".strip()


def _batch_finding(found: Sequence[Difference], step: int) -> Iterable[Finding]:
    if found:
        names = list(dict.fromkeys(difference.label[1] for difference in found if difference.label[1]))
        ranks = sorted({rank for difference in found for rank in difference.ranks})
        where = {"step": step, "field": ", ".join(names) or "inputs", "ranks": ranks}
        yield exact_finding(BATCHES, where, max(1, len(names)), ("input", "differs", "differ"))


def _number_finding(difference: Difference, step: int) -> Finding:
    where = {"step": step, "field": described(difference.label), "ranks": list(difference.ranks)}
    values = {f"rank {rank}": value for rank, value in sorted(difference.values.items())}
    evidence = {"values": values, **_since(difference, step)}
    return exact_finding(REPLICAS, where, 1, ("number", "differs", "differ"), None, evidence)


def _tensors_finding(found: Sequence[Difference], ranks: tuple[int, ...], step: int) -> Finding:
    """Return the finding that these ranks alone differ, which names the first tensor and lists the others."""
    first = found[0]
    kind, name, _ = first.label
    where: Mapping[str, Any] = {
        "phase": "backward" if kind == "gradient" else "update",
        "step": step,
        **({"module": name.rpartition(".")[0]} if kind == "buffer" else {"parameter": name}),
        "field": described(first.label),
        "ranks": list(ranks),
    }
    evidence = {
        "count_differing": len(found),
        **({"first_of": len(found)} if len(found) > 1 else {}),
        "also": [{"kind": each.label[0], "name": _name(each.label)} for each in found[1:]],
        **_since(first, step),
    }
    # Of the kind that is named: gradients and states may be compared here for the first time.
    was_right = all(each.right_at is not None for each in found if each.label[0] == kind)
    explanation = Explanation(Cause.REPLICA_DRIFT) if was_right else None
    return exact_finding(REPLICAS, where, len(found), ("tensor", "differs", "differ"), explanation, evidence)


def _name(label: Label) -> str:
    return f"{label[1]} {label[2]}".strip()


def _since(difference: Difference, step: int) -> dict[str, Any]:
    if difference.right_at is None:
        return {"note": f"different since the first check that compared it; now after step {step}"}
    note = f"equal at the check after step {difference.right_at}, different at this one, after step {step}"
    return {"last_right_step": difference.right_at, "note": note}


def _not_finite_finding(found: Sequence[NotFinite], step: int) -> Iterable[Finding]:
    if found:
        names = list(dict.fromkeys(each.name for each in found))
        ranks = sorted({each.rank for each in found if each.name == names[0]})
        where = {"phase": "backward", "step": step, "parameter": names[0], "ranks": ranks}
        evidence: dict[str, Any] = {"also": [{"kind": "gradient", "name": name} for name in names[1:]]}
        if len(names) > 1:
            evidence["first_of"] = len(names)
        counted = ("gradient", "has infinite or NaN elements", "have infinite or NaN elements")
        yield exact_finding(FINITE, where, len(names), counted, Explanation(Cause.NOT_FINITE), evidence)
