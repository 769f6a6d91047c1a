"""`record` and `compare_traces`: the trace of a sharded model is compared with that of the unsharded one."""

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
from tpcheck.numerics.activation_placement import infer_placement
from tpcheck.numerics.checks import CHECK_NAMES
from tpcheck.numerics.evidence import Evidence, RankFacts, Step
from tpcheck.numerics.tolerance import NUM_REPLAYS, Tolerance
from tpcheck.numerics.verdict import full_answer, start_answer, verdict
from tpcheck.report.report import Report
from tpcheck.runs.trace import RankRecording

# A trace holds neither live groups nor the norm that the loop clipped by.
_CHECKS = tuple(
    name for name in CHECK_NAMES if name not in ("groups_match_topology", "gradient_norm_matches_reference")
)


def compare_recordings(
    candidate: Sequence[RankRecording],
    reference: Sequence[RankRecording],
    *,
    subject: Mapping[str, Any],
    again: str | None,
) -> Verdict:
    """Return the verdict over all TP groups that were given the reference's inputs.

    Raises:
        UsageError: The traces cannot be compared.
    """
    unsharded = reference[0]
    _require_comparable(candidate, unsharded)
    topology = candidate[0].topology
    num_steps = min(len(candidate[0].steps), len(unsharded.steps))
    updated = [any(rank.steps[step].weights for rank in (*candidate, unsharded)) for step in range(num_steps)]
    filled_ranks = tuple(_with_weights(rank, updated) for rank in candidate)
    filled_reference = _with_weights(unsharded, updated)
    answers, missed = [], {}
    for dp_rank, ranks in enumerate(topology.groups("tp")):
        if not _same_inputs(candidate[ranks[0]], unsharded):
            missed[f"replica {dp_rank}"] = "its inputs differ from the reference's"
            continue
        evidence = _evidence(filled_ranks, [filled_ranks[rank] for rank in ranks], filled_reference, dp_rank)
        answers.append(full_answer(start_answer(evidence, _CHECKS), evidence, _CHECKS))
    shorter = "reference" if len(candidate[0].steps) > num_steps else "candidate"
    for step in range(num_steps, max(len(candidate[0].steps), len(unsharded.steps))):
        missed[f"step {step}"] = f"the trace of the {shorter} has no step {step}"
    if not answers:
        reason = "no replica of the candidate saw the reference's inputs: record both runs on the same batches"
        return Verdict(
            "skipped", subject, unsharded.versions, coverage=Coverage(0, len(missed), missed), message=reason
        )
    compared = verdict(
        answers, steps=num_steps, subject=subject, environment=unsharded.versions, again=again, seconds=0.0
    )
    coverage = compared.coverage
    all_missed = {**coverage.not_compared, **missed}
    return replace(compared, coverage=Coverage(coverage.compared, coverage.total + len(missed), all_missed))


def _require_comparable(candidate: Sequence[RankRecording], reference: RankRecording) -> None:
    if reference.deviations is None:
        raise UsageError("reference", f"tp={reference.topology.tp}", "a trace of the unsharded model, tp=1")
    if candidate[0].dtype != reference.dtype:
        raise UsageError("candidate", candidate[0].dtype, f"a trace in the reference's dtype, {reference.dtype}")


def _same_inputs(rank: RankRecording, reference: RankRecording) -> bool:
    """Return whether every call that both recorded was given equal tensors, of the names that both have."""
    for actual, expected in zip(rank.inputs, reference.inputs, strict=False):
        shared = actual.keys() & expected.keys()
        if not shared or not all(torch.equal(actual[name], expected[name]) for name in shared):
            return False
    return True


def _with_weights(recorded: RankRecording, updated: Sequence[bool]) -> RankRecording:
    """Return the recording with weights after each call where any rank, or the reference, took an optimizer step.

    A recording stores the weights of a step only where they changed; elsewhere the weights, and how far they may
    differ, are those of the last step before.
    """
    weights, steps, last = recorded.initial, [], -1
    deviations = dict(recorded.deviations or {})
    for number, (step, is_updated) in enumerate(zip(recorded.steps, updated, strict=False)):
        if step.weights:
            weights, last = step.weights, number
        elif is_updated:
            deviations |= {(number, "weight", name): deviations.get((last, "weight", name), 0.0) for name in weights}
        steps.append(replace(step, weights=weights if is_updated else {}))
    return replace(recorded, steps=tuple(steps), deviations=None if recorded.deviations is None else deviations)


def _evidence(
    ranks: Sequence[RankRecording], tp_group: Sequence[RankRecording], reference: RankRecording, dp_rank: int
) -> Evidence:
    num_steps = min(len(tp_group[0].steps), len(reference.steps))
    assert reference.deviations is not None
    deviations = {_key_of_replica(key, dp_rank): value for key, value in reference.deviations.items()}
    return Evidence(
        topology=tp_group[0].topology,
        dp_rank=dp_rank,
        dtype=reference.dtype,
        initial=reference.initial,
        initial_parts=tuple(rank.initial for rank in tp_group),
        layouts=_layouts(tp_group, reference),
        reference=reference.steps[:num_steps],
        candidate=tuple(tuple(rank.steps[step] for rank in tp_group) for step in range(num_steps)),
        buffers=reference.buffers,
        facts=tuple(RankFacts({}, _digests(rank, num_steps)) for rank in ranks),
        tolerance=Tolerance(_scalar_eps(reference.dtype), NUM_REPLAYS, deviations),
    )


def _key_of_replica(key: Any, dp_rank: int) -> Any:
    """Return a deviation's key for another replica; only keys of activations and losses name one."""
    return (key[0], dp_rank, *key[2:]) if key[1] == 0 else key


def _scalar_eps(dtype: str) -> float:
    return float(torch.finfo(torch.promote_types(getattr(torch, dtype), torch.float32)).eps)


def _digests(recorded: RankRecording, num_steps: int) -> tuple[Mapping[tuple[str, str], str], ...]:
    return (_digest_all("parameter", recorded.initial), *map(_step_digests, recorded.steps[:num_steps]))


def _step_digests(step: Step) -> dict[tuple[str, str], str]:
    return _digest_all("parameter", step.weights) | _digest_all("buffer", step.buffers)


def _digest_all(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], str]:
    return {(kind, name): digest(tensor) for name, tensor in tensors.items()}


def _layouts(tp_group: Sequence[RankRecording], reference: RankRecording) -> dict[str, Layout]:
    """Return the recorded layouts; of other parameters those that shapes imply: one dim cut in the order of ranks."""
    layouts = dict(tp_group[0].layouts)
    for name, tensor in reference.initial.items():
        if name not in layouts and all(name in rank.initial for rank in tp_group):
            layout = _layout_from_shapes(tuple(tensor.shape), [rank.initial[name] for rank in tp_group])
            if layout is not None:
                layouts[name] = layout
    return layouts


def _layout_from_shapes(shape: tuple[int, ...], parts: Sequence[torch.Tensor]) -> Layout | None:
    placed = infer_placement(shape, parts)
    if placed is None:
        return None
    assert isinstance(placed.placement, (Shard, Replicate))  # terms of a sum have the full shape, as replicas have
    return Layout.from_placement(shape, placed.placement, len(parts))


def record(model: Any, path: str | Path, *, topology: Topology | None = None) -> AbstractContextManager[Any]:
    """Record what `model` computes in a training loop: each call, its backward pass, the weights after its step.

    The trace of the unsharded model is replayed when the context ends, to measure what rounding alone can do to each
    tensor; that of a sharded one (every rank enters the context) is only written.

    Args:
        model: A module, or an engine around one. It is called at least once inside.
        path: Folder that is written when the context ends without an error; an older trace there is replaced.
        topology: Sizes of the axes; needed unless DeepSpeed, transformers, accelerate or Megatron know them.

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
    actual, expected = read_trace("candidate", candidate), read_trace("reference", reference)
    topology = actual[0].topology
    subject = {
        "subject": str(candidate),
        "tp": topology.tp,
        "dp": topology.dp,
        "dtype": actual[0].dtype,
        "reference": str(reference),
    }
    again = compare_command(str(candidate), str(reference))
    with few_threads(sum(tensor.numel() for tensor in expected[0].initial.values())):
        compared = compare_recordings(actual, expected, subject=subject, again=again)
    return Report(replace(compared, seconds=time.monotonic() - start))
