"""Findings and tables as text, JSON, JUnit, Markdown and HTML."""

from tpcheck.report.json_values import SCHEMA
from tpcheck.report.junit import as_junit
from tpcheck.report.report import Report

__all__ = ["SCHEMA", "Report", "as_junit"]
