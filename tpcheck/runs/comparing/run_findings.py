"""What a check of two runs answers: margins, findings with their place and evidence, what was not compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.findings import Finding, MarginPhase
from tpcheck.numerics.evidence import MarginsByModule, worst_by_module
from tpcheck.numerics.sketch import TILES
from tpcheck.runs.comparing.comparisons import Comparison

OUTPUTS = "outputs_match_reference"
GRADIENTS = "gradients_match_reference"
NORM = "gradient_norm_matches_reference"
UPDATES = "updates_match_reference"
STATES = "optimizer_state_matches_reference"
REPLICAS = "replicas_agree"
WEIGHTS = "weights_match_reference"
GROUPS = "groups_match_topology"
BATCHES = "batches_agree_within_tp"

_MARGIN_PHASES: Mapping[str, MarginPhase] = {
    "output": "forward",
    "output_gradient": "backward",
    "gradient": "backward",
}
PHASES: Mapping[str, str] = _MARGIN_PHASES

# Share of a difference's square that lies in a band of tiles, where that band is named: beyond it rounding may be seen.
_IN_BAND = 0.99


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one check at one step.

    Attributes:
        check: Its name.
        step: Number of the step; -1 for the start.
        margins: Observed / allowed error of every comparison that was judged, by name.
        findings: What failed, the first in the order of events.
        not_compared: Why something could not be compared, by name.
        comparisons: What was compared, for a picture; those without an allowed error, too.
        is_given: Whether the weights after the step differ by something that is not judged.
    """

    check: str
    step: int
    margins: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    not_compared: Mapping[str, str] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    is_given: bool = False

    @classmethod
    def of(
        cls,
        check: str,
        step: int,
        comparisons: Sequence[Comparison],
        findings: Iterable[Finding] = (),
        not_compared: Mapping[str, str] | None = None,
        left_out: Iterable[Comparison] = (),
    ) -> Answer:
        """Return the answer over these comparisons; those that were left out are not judged."""
        skipped = {comparison.key for comparison in left_out}
        margins = {
            comparison.label: comparison.margin
            for comparison in comparisons
            if comparison.is_judged and comparison.key not in skipped
        }
        return cls(check, step, margins, tuple(findings), not_compared or {}, tuple(comparisons))

    def by_module(self) -> MarginsByModule:
        """Return the worst margin of each module of the comparisons that were judged."""
        margins: list[MarginsByModule] = []
        for comparison in self.comparisons:
            if comparison.label in self.margins:
                is_of_module = comparison.kind in ("output", "output_gradient")
                module = comparison.name if is_of_module else comparison.name.rpartition(".")[0]
                margins.append({(_MARGIN_PHASES.get(comparison.kind, "weights"), module): comparison.margin})
        return worst_by_module(*margins)


@dataclass(frozen=True, slots=True)
class Measured:
    """What all findings of a comparison say of how it was made.

    Attributes:
        dtype: The lower one of the two runs.
        replays: How many replays measured what rounding does.
    """

    dtype: str
    replays: int


def finding_at(
    check: str,
    step: int,
    comparison: Comparison,
    explanation: Explanation | None,
    measured: Measured,
    *,
    phase: str | None = None,
    evidence: Mapping[str, Any] | None = None,
) -> Finding:
    """Return the finding that a tensor is wrong."""
    shown = {
        "dtype": measured.dtype,
        **({"replays": measured.replays} if measured.replays else {}),
        **(evidence or {}),
        **where_in_tensor(comparison),
    }
    return Finding(
        check=check,
        where=place_of(comparison, step, phase or PHASES.get(comparison.kind, "update")),
        observed=comparison.relative,
        allowed=comparison.relative_allowed,
        **explained(explanation, shown),
    )


def exact_finding(
    check: str,
    where: Mapping[str, Any],
    count: float,
    counted: tuple[str, str, str],
    explanation: Explanation | None = None,
    evidence: Mapping[str, Any] | None = None,
) -> Finding:
    """Return the finding of an exact check: so many things are wrong.

    Args:
        counted: What is counted and what is wrong with one and with several: `("rank", "differs", "differ")`.
    """
    shown = {"counted": list(counted), **(evidence or {})}
    return Finding(check, where, float(count), 0.0, **explained(explanation, shown))


def explained(explanation: Explanation | None, evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cause and the evidence of a finding."""
    if explanation is None:
        return {"cause": None, "evidence": dict(evidence)}
    error = {"cause_error": explanation.residual} if explanation.residual else {}
    advice = explanation.cause.advise(explanation.evidence)
    return {
        "cause": explanation.cause.slug,
        "evidence": {**evidence, **explanation.evidence, **error, **({"advice": advice} if advice else {})},
    }


def place_of(comparison: Comparison, step: int, phase: str) -> dict[str, Any]:
    """Return where a tensor is: phase, step, module or parameter, ranks."""
    where: dict[str, Any] = {"phase": phase, "step": step} if step >= 0 else {"phase": "start"}
    kind, name, part, call = comparison.key
    if kind in ("output", "output_gradient"):
        what = "gradient of output" if kind == "output_gradient" else "output"
        where |= {"module": name, "field": f"{what} {part}".strip() + (f", call {call}" if call else "")}
    elif kind == "buffer":
        where |= {"module": name.rpartition(".")[0], "field": f"buffer {name}"}
    else:
        where |= {"parameter": name}
        if kind in ("state", "master"):
            where |= {"field": f"{part or kind} of {name}"}
    return {**where, "ranks": list(comparison.wrong_ranks())}


def where_in_tensor(comparison: Comparison) -> dict[str, Any]:
    """Return the rows and the columns in which nearly all of the difference lies, where these are a part of all."""
    worst = max(zip(comparison.actual.variants, comparison.errors, strict=True), key=lambda of_variant: of_variant[1])[
        0
    ]
    shape = comparison.expected.shape
    if comparison.is_of_norms or len(shape) < 2 or worst.sketch.numel < TILES:
        return {}
    energy = (worst.sketch - comparison.expected.sketch).tile_norms() ** 2
    whole = float(energy.sum())
    if not 0 < whole < float("inf"):
        return {}
    found = {}
    keyed = shape[0] == -1
    sizes = {"rows": 0 if keyed else prod(shape[:-1]), "columns": shape[-1]}
    for axis, (name, size) in enumerate(sizes.items()):
        if size < TILES:
            continue
        along = energy.sum(dim=1 - axis)
        first, last = 0, TILES
        while last - first > 1 and float(along[first + 1 : last].sum()) >= _IN_BAND * whole:
            first += 1
        while last - first > 1 and float(along[first : last - 1].sum()) >= _IN_BAND * whole:
            last -= 1
        if last - first < TILES:
            found[f"differs_in_{name}"] = f"{-(-first * size // TILES)} to {-(-last * size // TILES) - 1} of {size}"
    return found


def joined(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings about parameters with those of the same cause in one, which names the others."""
    by_cause: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in findings:
        by_cause.setdefault((finding.check, finding.where.get("phase"), finding.cause), []).append(finding)
    merged = []
    for first, *others in by_cause.values():
        own = first.where.get("parameter") or first.where.get("module")
        listed = [
            *first.evidence.get("also", ()),
            *(
                name
                for finding in others
                for name in (
                    finding.where.get("parameter") or finding.where.get("module"),
                    *finding.evidence.get("also", ()),
                )
            ),
        ]
        names = [name for name in dict.fromkeys(listed) if name != own]
        ranks = sorted({rank for finding in (first, *others) for rank in finding.where.get("ranks", ())})
        also: dict[str, Any] = {"also": names} if names else {}
        if "factors" in first.evidence:
            every = (factor for each in (first, *others) for factor in each.evidence.get("factors", ()))
            also["factors"] = list(dict.fromkeys(every))
        merged.append(
            Finding(
                first.check,
                {**first.where, "ranks": ranks},
                first.observed,
                first.allowed,
                first.cause,
                {**first.evidence, "first_of": len(names) + 1, **also},
            )
        )
    return merged


def names_in(findings_of_checks: Iterable[Iterable[Finding]]) -> frozenset[str]:
    """Return the parameters that findings are about."""
    return frozenset(
        name
        for findings in findings_of_checks
        for finding in findings
        for name in (str(finding.where.get("parameter", "")), *map(str, finding.evidence.get("also", ())))
    )


def stale(count: int) -> Explanation:
    """Return the cause of weights that an optimizer's step left as they were."""
    return Explanation(
        Cause.STALE_WEIGHT, evidence={"note": f"{count} weights are to the bit what they were before the step"}
    )
