"""Names what happened to a tensor of a checkpoint, only where that is seen in its bits."""

from tpcheck.causes.checkpoint.case import Case, Story, Surroundings
from tpcheck.causes.checkpoint.explain import explain_tensor

__all__ = ["Case", "Story", "Surroundings", "explain_tensor"]
