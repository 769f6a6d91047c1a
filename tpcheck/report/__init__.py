"""Findings to text, JSON and JUnit. All text that a user reads about a run is made here."""

from tpcheck.report.data import SCHEMA
from tpcheck.report.junit import as_junit
from tpcheck.report.report import Report

__all__ = ["SCHEMA", "Report", "as_junit"]
