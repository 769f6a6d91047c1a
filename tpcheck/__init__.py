"""tpcheck tells whether tensor-parallel training is right, and where and why it is not.

Importing this package loads nothing heavy: every name below is resolved at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpcheck.api import compare_traces as compare_traces
    from tpcheck.api import record as record
    from tpcheck.api import verify as verify
    from tpcheck.api import verify_checkpoint as verify_checkpoint
    from tpcheck.api import verify_family as verify_family
    from tpcheck.dataloader import check_batch as check_batch
    from tpcheck.dataloader import watch as watch
    from tpcheck.errors import BackendError as BackendError
    from tpcheck.errors import BatchMismatch as BatchMismatch
    from tpcheck.errors import CheckpointError as CheckpointError
    from tpcheck.errors import Mismatch as Mismatch
    from tpcheck.errors import RankFailure as RankFailure
    from tpcheck.errors import RankOutcome as RankOutcome
    from tpcheck.errors import TpcheckError as TpcheckError
    from tpcheck.errors import UnevenBatches as UnevenBatches
    from tpcheck.errors import UsageError as UsageError
    from tpcheck.records import Finding as Finding
    from tpcheck.report import Report as Report
    from tpcheck.topology import Topology as Topology
    from tpcheck.trainer.callback import TpcheckCallback as TpcheckCallback
    from tpcheck.trainer.model import watch_model as watch_model
    from tpcheck.world import Rank as Rank
    from tpcheck.world import World as World
    from tpcheck.world import attach as attach
    from tpcheck.world import spawn as spawn

_HOME = {
    "BackendError": "errors",
    "BatchMismatch": "errors",
    "CheckpointError": "errors",
    "Finding": "records",
    "Mismatch": "errors",
    "Rank": "world",
    "RankFailure": "errors",
    "RankOutcome": "errors",
    "Report": "report",
    "Topology": "topology",
    "TpcheckCallback": "trainer.callback",
    "TpcheckError": "errors",
    "UnevenBatches": "errors",
    "UsageError": "errors",
    "World": "world",
    "attach": "world",
    "check_batch": "dataloader",
    "compare_traces": "api",
    "record": "api",
    "spawn": "world",
    "verify": "api",
    "verify_checkpoint": "api",
    "verify_family": "api",
    "watch": "dataloader",
    "watch_model": "trainer.model",
}

__all__ = sorted(_HOME)  # the table above is the one list of names


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tpcheck' has no attribute {name!r}")
    return getattr(import_module(f"tpcheck.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
