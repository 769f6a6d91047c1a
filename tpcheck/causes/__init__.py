"""Names the cause of a suspect, only where its own numerical test holds."""

from tpcheck.causes.explain import Explanation, explain

__all__ = ["Explanation", "explain"]
