"""Searches one family for a configuration in which the sharded model differs from the unsharded one.

Configurations have uneven sizes, switches, and options that must not change the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tpcheck.backends.interface import Backend, HasConfigVariants, TrainingOptions
from tpcheck.backends.registry import load_backend
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Verdict
from tpcheck.core.topology import Topology
from tpcheck.families.build import Dimensions, dimensions, small_model
from tpcheck.families.settings import overlay
from tpcheck.lab.fuzz.results import REFUSALS, Outcome, SearchResult, crash_kind, in_general
from tpcheck.lab.fuzz.search import Bounds, Limits, OnOutcome, require_hypothesis, search, versions_with
from tpcheck.lab.known import explained
from tpcheck.lab.matrix import summary_line
from tpcheck.model.options import RunOptions, Tokens
from tpcheck.model.verify import verify_family
from tpcheck.report.json_values import printable

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

# Small and uneven: a wrong boundary shows with 3 heads on 2 ranks, and a size of 4096 shows no more than one of 12.
_MOST_KV_HEADS = 4
_MOST_GROUPS = 3
_MOST_HALF_HEAD_DIM = 6  # rotary embeddings cut a head in two halves, so its size is even
_MOST_WIDTH_OF_HEAD = 12
_MOST_INTERMEDIATE = 70
_MOST_LAYERS = 3
_EXPERTS = (2, 6)  # of which two process a token
_MOST_VOCABULARY = 150
_MOST_ROWS = 3
_LENGTHS = (2, 20)


def family_examples(family: str, bounds: Bounds, common: RunOptions) -> SearchStrategy[RunOptions]:
    """Return what draws options for the family; the settings, the configuration and the rest of `common` are fixed.

    Raises:
        UsageError: No such family or setting, or the backend takes none of the ZeRO stages.
    """
    from hypothesis import strategies as st

    there = dimensions(family, common.settings)
    backend = load_backend(common.backend)
    variants = backend.config_variants() if isinstance(backend, HasConfigVariants) else ()
    refusals = {stage: _refusal(backend, stage, common.config) for stage in bounds.zero}
    stages = [stage for stage, refusal in refusals.items() if refusal is None]
    for refusal in refusals.values():
        if refusal is not None and not stages:
            raise refusal

    @st.composite
    def drawn(draw: DrawFn) -> RunOptions:
        merged = dict(common.config)
        for variant in variants:
            if draw(st.booleans()):
                merged = overlay(merged, overlay(variant, common.config))
        tp, dp = draw(st.sampled_from(bounds.tp)), draw(st.sampled_from(bounds.dp))
        return replace(
            common,
            topology=Topology(tp=tp, dp=dp),
            zero_stage=draw(st.sampled_from(stages)),
            dtype=draw(st.sampled_from(bounds.dtype)),
            settings={**_drawn_settings(draw, there, common.settings), **common.settings},
            config=merged,
            batch=_drawn_batch(draw),
        )

    return drawn()


def _refusal(backend: Backend, stage: int, config: Mapping[str, Any]) -> UsageError | None:
    try:
        backend.resolved(TrainingOptions(dtype=torch.float64, zero_stage=stage, config=config))
    except UsageError as error:
        return error
    return None


def _drawn_settings(draw: DrawFn, there: Dimensions, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Draw sizes and switches; each may keep its default, which is what it shrinks to."""
    from hypothesis import strategies as st

    free = {role for role, names in there.names.items() if not set(names) & set(fixed)}
    sizes: dict[str, int] = {}
    if draw(st.booleans()):
        sizes |= {role: size for role, size in _heads(draw, there).items() if role in free}
    ranges = {
        "intermediate": (1, _MOST_INTERMEDIATE),
        "layers": (1, _MOST_LAYERS),
        "experts": _EXPERTS,
        "vocabulary": (max(2, there.least_vocabulary), _MOST_VOCABULARY),
    }
    for role, (least, most) in ranges.items():
        if role in free and draw(st.booleans()):
            sizes[role] = draw(st.integers(least, most))
    switches = {name: not value for name, value in there.switches.items() if name not in fixed}
    return there.settings(sizes) | {name: value for name, value in switches.items() if draw(st.booleans())}


def _heads(draw: DrawFn, there: Dimensions) -> dict[str, int]:
    """Draw consistent sizes of attention: heads share key heads evenly, and make up the hidden size."""
    from hypothesis import strategies as st

    kv_heads = draw(st.integers(1, _MOST_KV_HEADS))
    heads = kv_heads * draw(st.integers(1, _MOST_GROUPS))
    head_dim = 2 * draw(st.integers(1, _MOST_HALF_HEAD_DIM))
    of_model = draw(st.integers(1, _MOST_WIDTH_OF_HEAD)) if "head_dim" in there.names else head_dim
    return {"kv_heads": kv_heads, "heads": heads, "head_dim": head_dim, "hidden": heads * of_model}


def _drawn_batch(draw: DrawFn) -> Tokens | None:
    from hypothesis import strategies as st

    if not draw(st.booleans()):
        return None
    tokens = Tokens(
        rows=draw(st.integers(1, _MOST_ROWS)),
        length=draw(st.integers(*_LENGTHS)),
        padded=draw(st.booleans()),
        strided=draw(st.booleans()),
    )
    return None if tokens == Tokens() else tokens


# The message of a `BackendError`: the phase and the exception.
_BLAMED = re.compile(r"^[^,\n]+, (?P<phase>[^:\n]+): (?P<error>\w+): (?P<text>.*)", re.DOTALL)
_REFUSING = "sharding the model"


def fuzz_family(
    family: str, bounds: Bounds, common: RunOptions, limits: Limits, on_outcome: OnOutcome, *, known: bool = True
) -> SearchResult:
    """Draw options within the bounds for a family, verify each, and shrink what fails.

    Args:
        common: The options that are not drawn.
        known: A registered upstream bug is no finding.

    Raises:
        UsageError: No such family or backend, or a bound is wrong.
        TpcheckError: hypothesis is not installed.
    """
    require_hypothesis()
    examples = family_examples(family, bounds, common)

    def run(drawn: RunOptions) -> Outcome:
        return outcome_of(family, drawn, known=known)

    searched = search(examples, run, limits, on_outcome)
    asked = {"family": family, "backend": common.backend_name, "examples": limits.examples, "seed": limits.seed}
    return replace(searched, subject={**asked, **bounds.as_dict()}, environment=versions_with(common.backend))


def outcome_of(family: str, options: RunOptions, *, known: bool = True) -> Outcome:
    """Verify one choice of options, and say what its verdict means in a search."""
    command = options.command(family) or str(printable(options.subject(family)))
    try:
        small_model(family, options.settings)  # here, since most refusals are of the model, and worlds take their time
        verdict = verify_family(family, **options.keywords()).verdict
    except UsageError as error:
        return Outcome("refused", reason=in_general(str(error)), command=command)
    if verdict.verdict not in ("failed", "error"):
        return Outcome("passed", command=command)
    verdict = replace(verdict, environment={**versions_with(options.backend), **verdict.environment})
    if known and (bug := explained(verdict)):
        return Outcome("known", bug.name, bug.what, command, verdict)
    if verdict.verdict == "error":
        return _crashed(verdict, command)
    return Outcome("failed", f"failed {verdict.findings[0].check}", summary_line(verdict), command, verdict)


def _crashed(verdict: Verdict, command: str) -> Outcome:
    """Return what a crash is: a refusal that says so, or a finding."""
    blamed = _BLAMED.match(verdict.message or "")
    if blamed is None:
        return Outcome("error", "error of a rank", summary_line(verdict), command, verdict)
    if blamed["phase"] == _REFUSING and blamed["error"] in REFUSALS:
        return Outcome("refused", reason=in_general(verdict.message or ""), command=command)
    kind = crash_kind(f"error {blamed['phase']} {blamed['error']}", blamed["text"])
    return Outcome("error", kind, summary_line(verdict), command, verdict)
