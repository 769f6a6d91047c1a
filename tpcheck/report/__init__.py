"""Findings and tables as text, JSON, JUnit, Markdown and HTML."""

from tpcheck.report.report import Report

__all__ = ["Report"]
