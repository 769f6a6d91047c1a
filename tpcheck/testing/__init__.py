"""What others test their own code with: the conformance kit that every backend runs."""

from tpcheck.testing.conformance import backend_conformance, require_conformance

__all__ = ["backend_conformance", "require_conformance"]
