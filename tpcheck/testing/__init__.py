"""Tests for other repositories: the conformance kit of backends, and every family as a test case."""

from tpcheck.testing.conformance import backend_conformance, require_conformance
from tpcheck.testing.family_tests import family_tests

__all__ = ["backend_conformance", "family_tests", "require_conformance"]
