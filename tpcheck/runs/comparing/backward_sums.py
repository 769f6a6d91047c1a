"""Sums over the ranks in the forward pass through which no gradient, or the ranks' own terms alone, come back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.findings import Finding
from tpcheck.numerics.sketch import Sketch
from tpcheck.runs.comparing.alignment import Run
from tpcheck.runs.comparing.comparisons import Comparison, Table
from tpcheck.runs.comparing.run_findings import GRADIENTS, explained
from tpcheck.runs.trace.wholes import Records


def is_summed_inside(module: str, weights: Table, run: Run) -> bool:
    """Return whether a module has parameters of its own of which the TP ranks hold different shards.

    Where its output is whole on every rank nevertheless, it was added up over them.
    """
    return any(
        key[0] == "weight" and key[1].rpartition(".")[0] == module and _is_sharded(records, run)
        for key, records in weights.items()
    )


def _is_sharded(records: Records, run: Run) -> bool:
    group = run.replicas[0]
    pieces = {records[rank].readings[0].piece for rank in group if rank in records and records[rank].readings}
    return len(pieces) > 1


def residuals_before(comparisons: Sequence[Comparison], wrong: Comparison) -> dict[str, Sketch]:
    """Return the right gradients of whole outputs of the wrong one's shape that come before it, the nearest first."""
    position = [each.key for each in comparisons].index(wrong.key)
    shape = wrong.expected.shape
    return {
        each.name: each.expected.sketch
        for each in reversed(comparisons[:position])
        if each.name and each.expected.shape == shape and not each.is_wrong and each.actual.is_replicated_over_tp
    }


def feeding_module(comparisons: Sequence[Comparison], wrong: Comparison) -> Comparison | None:
    """Return the gradient that came last before a wrong one: that of the output of the module that it comes from."""
    position = [each.key for each in comparisons].index(wrong.key)
    return comparisons[position - 1] if position else None


def at_sums_without_backward(
    missing: Sequence[Finding], backward: Iterable[Comparison], weights: Table, run: Run, expected: Table
) -> list[Finding]:
    """Return findings of missing gradients; those behind a sum over the ranks that has no backward pass as one.

    The gradient of a module's output is right, and whole on every rank, although its weights are cut over them: it is
    a sum. All of its weights have no gradient on any rank, and neither has what comes before it in the forward pass:
    none comes back through that sum. Of weights that are frozen, or cleared after the passes, others are right; where
    nothing comes before it, as before an embedding, they look the same, and are left as they are.

    Args:
        expected: Tensors of the expected run, in the order of events.
    """
    agreeing = [each for each in backward if not each.is_wrong]
    right = {each.name for each in agreeing if each.actual.is_replicated_over_tp}
    reached = {each.name for each in agreeing}
    by_module: dict[str, list[Finding]] = {}
    for finding in missing:
        by_module.setdefault(str(finding.where["parameter"]).rpartition(".")[0], []).append(finding)
    behind = [
        module
        for module, findings in by_module.items()
        if module in right
        and (feeding := _feeding_module_of(module, expected)) is not None
        and feeding not in reached
        and is_summed_inside(module, weights, run)
        and all({*finding.where["ranks"]} == {*run.members} for finding in findings)
    ]
    if not behind:
        return list(missing)
    last = behind[-1]  # in the order of the model, so the first in the order of the backward pass
    first = next(each for each in by_module[last] if _is_sharded(_weight(weights, each), run))
    names = [str(each.where["parameter"]) for each in missing if each is not first]
    explanation = Explanation(Cause.COLLECTIVE_WITHOUT_BACKWARD, evidence={"sum_in": behind})
    shown: Mapping[str, Any] = {**first.evidence, "also": names, "first_of": len(missing)}
    return [replace(first, check=GRADIENTS, **explained(explanation, shown))]


def _feeding_module_of(module: str, expected: Table) -> str | None:
    """Return the module whose output's gradient comes after that of a module's, and is another; None without one."""
    of_outputs = [(key[1], records) for key, records in expected.items() if key[0] == "output_gradient"]
    position = next((number for number, (name, _) in enumerate(of_outputs) if name == module), len(of_outputs))
    own = {record.digest for _, records in of_outputs[position : position + 1] for record in records.values()}
    following = of_outputs[position + 1 :]
    return next((name for name, records in following if own.isdisjoint(each.digest for each in records.values())), None)


def _weight(weights: Table, finding: Finding) -> Records:
    return weights.get(("weight", str(finding.where["parameter"]), "", 0), {})
