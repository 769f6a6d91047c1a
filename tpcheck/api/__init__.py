"""The Python entry points of a verification."""

from tpcheck.api.checkpoint import verify_checkpoint
from tpcheck.api.model import verify, verify_family
from tpcheck.api.traces import compare_traces, record

__all__ = ["compare_traces", "record", "verify", "verify_checkpoint", "verify_family"]
