"""Records a loop of the user's own, and compares two recordings."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpcheck.again import compare_command
from tpcheck.report import Report
from tpcheck.topology import Topology


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
    from tpcheck.verification.traces import Recorder

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
    from tpcheck.verification.traces import compare_recordings, few_threads, read_trace

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
