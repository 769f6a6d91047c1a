"""Findings to text, JSON and JUnit. All text that a user reads about a run is made here."""

from tpcheck.report.junit import as_junit
from tpcheck.report.report import Report

__all__ = ["Report", "as_junit"]
