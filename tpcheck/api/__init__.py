"""The Python entry points of a verification."""

from tpcheck.api.checkpoint import verify_checkpoint
from tpcheck.api.model import verify, verify_family

__all__ = ["verify", "verify_checkpoint", "verify_family"]
