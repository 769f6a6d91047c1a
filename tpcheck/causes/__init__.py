"""Names the cause of a suspect, only where its own numerical test holds."""

from tpcheck.causes.explain import explain
from tpcheck.causes.explanation import Explanation

__all__ = ["Explanation", "explain"]
