"""Records a loop of the user's own, and compares two recordings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tpcheck.backends.layout import Layout
from tpcheck.core.digests import digest
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Coverage, Verdict
from tpcheck.core.placement import Replicate, Shard
from tpcheck.core.reproduce import compare_command
from tpcheck.core.topology import Topology
from tpcheck.numerics.answer import full_answer, start_answer, verdict
from tpcheck.numerics.checks import CHECK_NAMES
from tpcheck.numerics.differences import place
from tpcheck.numerics.evidence import Evidence, RankFacts, Step
from tpcheck.numerics.tolerance import NUM_REPLAYS, Tolerance
from tpcheck.report.report import Report
from tpcheck.runs.trace import Recorded

# The groups of a user's own loop are what it was recorded with, and nobody tells the norm that it clipped by.
_CHECKS = tuple(
    name for name in CHECK_NAMES if name not in ("groups_match_topology", "gradient_norm_matches_reference")
)


def compare_recordings(
    candidate: Sequence[Recorded], reference: Sequence[Recorded], *, subject: Mapping[str, Any], again: str | None
) -> Verdict:
    """Return the verdict over all TP groups whose inputs the reference has seen.

    Raises:
        UsageError: The traces cannot be compared.
    """
    whole = reference[0]
    _require_comparable(candidate, whole)
    topology = candidate[0].topology
    number = min(len(candidate[0].steps), len(whole.steps))
    updated = [any(one.steps[step].weights for one in (*candidate, whole)) for step in range(number)]
    ranks_filled = tuple(_with_weights(one, updated) for one in candidate)
    whole_filled = _with_weights(whole, updated)
    answers, missed = [], {}
    for dp_rank, ranks in enumerate(topology.groups("tp")):
        parts = [candidate[rank] for rank in ranks]
        if not _same_inputs(parts[0], whole):
            missed[f"replica {dp_rank}"] = "it was given other inputs than the reference"
            continue
        evidence = _evidence(ranks_filled, [ranks_filled[rank] for rank in ranks], whole_filled, dp_rank)
        answers.append(full_answer(start_answer(evidence, _CHECKS), evidence, _CHECKS))
    longer = "candidate" if len(candidate[0].steps) > number else "reference"
    for step in range(number, max(len(candidate[0].steps), len(whole.steps))):
        missed[f"step {step}"] = f"only the {longer} was recorded that far"
    if not answers:
        reason = "no replica of the candidate was given the inputs of the reference"
        return Verdict("skipped", subject, whole.versions, coverage=Coverage(0, len(missed), missed), message=reason)
    found = verdict(answers, steps=number, subject=subject, environment=whole.versions, again=again, seconds=0.0)
    coverage = found.coverage
    both = {**coverage.not_compared, **missed}
    return replace(found, coverage=Coverage(coverage.compared, coverage.total + len(missed), both))


def _require_comparable(candidate: Sequence[Recorded], whole: Recorded) -> None:
    if whole.deviations is None:
        raise UsageError("reference", f"tp={whole.topology.tp}", "a trace of the unsharded model, tp=1")
    if candidate[0].dtype != whole.dtype:
        raise UsageError("candidate", candidate[0].dtype, f"a trace in the reference's dtype, {whole.dtype}")


def _same_inputs(part: Recorded, whole: Recorded) -> bool:
    for ours, theirs in zip(part.inputs, whole.inputs, strict=False):
        shared = ours.keys() & theirs.keys()
        if not shared or not all(torch.equal(ours[name], theirs[name]) for name in shared):
            return False
    return True


def _with_weights(one: Recorded, updated: Sequence[bool]) -> Recorded:
    """Return the recording with weights after each call where any rank, or the reference, took an optimizer step.

    A recording stores the weights of a step only where they changed, so elsewhere they are those from before; what an
    unchanged weight may differ by is what it could differ by then.
    """
    weights, steps, last = one.initial, [], -1
    deviations = dict(one.deviations or {})
    for number, (step, is_updated) in enumerate(zip(one.steps, updated, strict=False)):
        if step.weights:
            weights, last = step.weights, number
        elif is_updated:
            deviations |= {(number, "weight", name): deviations.get((last, "weight", name), 0.0) for name in weights}
        steps.append(replace(step, weights=weights if is_updated else {}))
    return replace(one, steps=tuple(steps), deviations=None if one.deviations is None else deviations)


def _evidence(everyone: Sequence[Recorded], parts: Sequence[Recorded], whole: Recorded, dp_rank: int) -> Evidence:
    number = min(len(parts[0].steps), len(whole.steps))
    assert whole.deviations is not None
    deviations = {_of_replica(key, dp_rank): value for key, value in whole.deviations.items()}
    return Evidence(
        topology=parts[0].topology,
        dp_rank=dp_rank,
        dtype=whole.dtype,
        initial=whole.initial,
        initial_parts=tuple(part.initial for part in parts),
        layouts=_layouts(parts, whole),
        reference=whole.steps[:number],
        candidate=tuple(tuple(part.steps[step] for part in parts) for step in range(number)),
        buffers=whole.buffers,
        facts=tuple(RankFacts({}, _digests(one, number)) for one in everyone),
        tolerance=Tolerance(_scalar_eps(whole.dtype), NUM_REPLAYS, deviations),
    )


def _of_replica(key: Any, dp_rank: int) -> Any:
    """Return a deviation's key for another replica: activations and the loss are of one."""
    return (key[0], dp_rank, *key[2:]) if key[1] == 0 else key


def _scalar_eps(dtype: str) -> float:
    return float(torch.finfo(torch.promote_types(getattr(torch, dtype), torch.float32)).eps)


def _digests(one: Recorded, number: int) -> tuple[Mapping[tuple[str, str], str], ...]:
    return (_digested("parameter", one.initial), *(_of_step(step) for step in one.steps[:number]))


def _of_step(step: Step) -> dict[tuple[str, str], str]:
    return _digested("parameter", step.weights) | _digested("buffer", step.buffers)


def _digested(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], str]:
    return {(kind, name): digest(tensor) for name, tensor in tensors.items()}


def _layouts(parts: Sequence[Recorded], whole: Recorded) -> dict[str, Layout]:
    """Return what the layers told, and for the rest what shapes tell: a cut of one dim into parts in their order."""
    found = dict(parts[0].layouts)
    for name, tensor in whole.initial.items():
        if name not in found and all(name in part.initial for part in parts):
            layout = _by_shape(tuple(tensor.shape), [part.initial[name] for part in parts])
            if layout is not None:
                found[name] = layout
    return found


def _by_shape(shape: tuple[int, ...], parts: Sequence[torch.Tensor]) -> Layout | None:
    placed = place(shape, parts)
    if placed is None:
        return None
    assert isinstance(placed.placement, (Shard, Replicate))  # terms of a sum have the whole shape, as replicas have
    return Layout.placed(shape, placed.placement, len(parts))


def record(model: Any, path: str | Path, *, topology: Topology | None = None) -> AbstractContextManager[Any]:
    """Record what `model` computes in a loop of one's own: each call, its backward pass, the weights after its step.

    The trace of the unsharded model is replayed when the context ends, to measure what rounding alone can do to each
    tensor; that of a sharded one (every rank enters the context) is only written.

    Args:
        model: A module, or an engine around one. It is called at least once inside.
        path: Folder that is written when the context ends without an error; an older trace there is replaced.
        topology: Sizes of the axes, where neither DeepSpeed, transformers, accelerate nor Megatron tells.

    Raises:
        UsageError: There is nothing to record, or the model draws random numbers, as dropout does.

    Example:
        >>> with tpcheck.record(model, "reference.trace"):  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
    """
    from tpcheck.runs.recording import Recorder

    return Recorder(model, path, topology)


def compare_traces(candidate: str | Path, reference: str | Path) -> Report:
    """Compare the trace of a sharded model with that of the unsharded one.

    Both must start from the same weights and be given the same inputs.

    Raises:
        UsageError: There is no trace at a path, or they cannot be compared.
        TpcheckError: A trace is damaged or incomplete.

    Example:
        >>> compare_traces("candidate.trace", "reference.trace").raise_if_failed()  # doctest: +SKIP
    """
    from tpcheck.runs.replaying import few_threads
    from tpcheck.runs.trace import read_trace

    start = time.monotonic()
    ours, theirs = read_trace("candidate", candidate), read_trace("reference", reference)
    topology = ours[0].topology
    subject = {
        "subject": str(candidate),
        "tp": topology.tp,
        "dp": topology.dp,
        "dtype": ours[0].dtype,
        "reference": str(reference),
    }
    again = compare_command(str(candidate), str(reference))
    with few_threads(sum(tensor.numel() for tensor in theirs[0].initial.values())):
        found = compare_recordings(ours, theirs, subject=subject, again=again)
    return Report(replace(found, seconds=time.monotonic() - start))
