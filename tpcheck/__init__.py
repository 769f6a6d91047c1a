"""tpcheck tells whether tensor-parallel training is right, and where and why it is not.

Importing this package loads nothing heavy: every name below is resolved at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from tpcheck.batches.loader import check_batch as check_batch
    from tpcheck.batches.loader import watch as watch
    from tpcheck.checkpoints.verify import verify_checkpoint as verify_checkpoint
    from tpcheck.core.errors import BackendError as BackendError
    from tpcheck.core.errors import BatchMismatch as BatchMismatch
    from tpcheck.core.errors import CheckpointError as CheckpointError
    from tpcheck.core.errors import Mismatch as Mismatch
    from tpcheck.core.errors import RankFailure as RankFailure
    from tpcheck.core.errors import RankOutcome as RankOutcome
    from tpcheck.core.errors import TpcheckError as TpcheckError
    from tpcheck.core.errors import UnevenBatches as UnevenBatches
    from tpcheck.core.errors import UsageError as UsageError
    from tpcheck.core.findings import Finding as Finding
    from tpcheck.core.topology import Topology as Topology
    from tpcheck.model.verify import verify as verify
    from tpcheck.model.verify import verify_family as verify_family
    from tpcheck.report import Report as Report
    from tpcheck.runs.comparing.compare import compare_traces as compare_traces
    from tpcheck.runs.guarding.guard import guard as guard
    from tpcheck.runs.recording.recorder import record as record
    from tpcheck.trainer.callback import TpcheckCallback as TpcheckCallback
    from tpcheck.trainer.model import watch_model as watch_model
    from tpcheck.world import Rank as Rank
    from tpcheck.world import World as World
    from tpcheck.world import attach as attach
    from tpcheck.world import spawn as spawn

_HOME = {
    "BackendError": "core.errors",
    "BatchMismatch": "core.errors",
    "CheckpointError": "core.errors",
    "Finding": "core.findings",
    "Mismatch": "core.errors",
    "Rank": "world",
    "RankFailure": "core.errors",
    "RankOutcome": "core.errors",
    "Report": "report",
    "Topology": "core.topology",
    "TpcheckCallback": "trainer.callback",
    "TpcheckError": "core.errors",
    "UnevenBatches": "core.errors",
    "UsageError": "core.errors",
    "World": "world",
    "attach": "world",
    "check_batch": "batches.loader",
    "compare_traces": "runs.comparing.compare",
    "guard": "runs.guarding.guard",
    "record": "runs.recording.recorder",
    "spawn": "world",
    "verify": "model.verify",
    "verify_checkpoint": "checkpoints.verify",
    "verify_family": "model.verify",
    "watch": "batches.loader",
    "watch_model": "trainer.model",
}

__all__ = sorted(_HOME)  # the table above is the one list of names


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("tpcheck")
    if name not in _HOME:
        raise AttributeError(f"module 'tpcheck' has no attribute {name!r}")
    try:
        return getattr(import_module(f"tpcheck.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        from tpcheck.core.extras import missing_package

        if (sentence := missing_package(error)) is None:
            raise
        return _unusable(name, sentence)


def _unusable(name: str, sentence: str) -> Any:
    """Return what stands for a name whose extra is missing, so that `help(tpcheck)` and `hasattr` work."""
    from tpcheck.core.errors import TpcheckError

    def fail(*args: Any, **kwargs: Any) -> None:
        raise TpcheckError(f"tpcheck.{name}: {sentence}")

    return type(name, (), {"__init__": fail, "__doc__": f"Unusable: {sentence}.", "__module__": "tpcheck"})


def __dir__() -> list[str]:
    return [*globals(), "__version__", *_HOME]
