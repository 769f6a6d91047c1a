"""The files of a trace: written step by step while a run goes on, and read without trusting them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tpcheck.runs.trace import RankTrace, StepRecord


class TraceWriter:
    """Write what one rank records into a folder that all ranks share, or that each node has.

    Args:
        path: The folder; it is made, or an older trace in it is replaced.
        header: What is known before the first step; its `steps` are empty.
        run_id: Made by rank 0 with `new_run_id` and shared with all ranks; keeps two runs apart.

    Raises:
        UsageError: The path is a file, or a folder with other files than those of a trace.
    """

    def __init__(self, path: str | Path, header: RankTrace, *, run_id: str) -> None:
        raise NotImplementedError

    def write_step(self, step: StepRecord) -> None:
        """Append a step; when this returns, it will be read even if the process is killed."""
        raise NotImplementedError

    def close(self, *, num_steps: int, not_recorded: Mapping[str, str] | None = None) -> None:
        """Write that the recording has ended, after this many steps of the optimizer."""
        raise NotImplementedError


def new_run_id() -> str:
    """Return a random name for a run."""
    raise NotImplementedError


def require_writable(path: str | Path) -> None:
    """Check that a trace can be written to this folder; change nothing.

    Raises:
        UsageError: The path is a file, or a folder with other files than those of a trace.
    """
    raise NotImplementedError


def read_trace(path: str | Path | Sequence[str | Path], name: str = "path") -> tuple[RankTrace, ...]:
    """Return what every rank recorded, by rank; steps are read when they are asked for.

    Args:
        path: The folder, or those of several nodes without a shared disk.
        name: Of the argument, for error messages.

    Raises:
        UsageError: There is no trace.
        TpcheckError: The trace is damaged, incomplete, hostile or of another version.
    """
    raise NotImplementedError
