"""Verdicts as JUnit XML: one suite for each subject, one test case for each check."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree as ET

from tpcheck.core.findings import Finding, Verdict
from tpcheck.report import words
from tpcheck.report.findings import finding_lines, place
from tpcheck.report.text import verdict_lines
from tpcheck.report.words import as_text

# XML 1.0 has no way to write other control characters, which a backend's message may hold (colours).
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_junit(verdicts: Iterable[Verdict]) -> str:
    """Return an XML document that CI servers read."""
    root = ET.Element("testsuites", name="tpcheck")
    for verdict in verdicts:
        root.append(_suite(verdict))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _suite(verdict: Verdict) -> ET.Element:
    name = xml_text(" ".join([words.name(verdict.subject), *words.layout(verdict.subject)]))
    cases = list(_cases(verdict, name))
    counts = {tag: sum(case.find(tag) is not None for case in cases) for tag in ("failure", "error", "skipped")}
    suite = ET.Element(
        "testsuite",
        name=name,
        tests=str(len(cases)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
        time=f"{verdict.seconds:.3f}",
    )
    suite.extend(cases)
    return suite


def _cases(verdict: Verdict, suite: str) -> Iterable[ET.Element]:
    if verdict.verdict in ("error", "skipped"):
        case = ET.Element("testcase", classname=suite, name=verdict.verdict, time=f"{verdict.seconds:.3f}")
        first_line = next(iter((verdict.message or verdict.verdict).strip().splitlines()), verdict.verdict)
        ET.SubElement(case, verdict.verdict, message=xml_text(first_line)).text = xml_text(
            as_text(verdict_lines(verdict))
        )
        yield case
        return
    checks = {check.check: check.compared for check in verdict.checks}
    for check in [*checks, *dict.fromkeys(f.check for f in verdict.findings if f.check not in checks)]:
        case = ET.Element("testcase", classname=suite, name=check)
        findings = [finding for finding in verdict.findings if finding.check == check]
        if findings:
            ET.SubElement(case, "failure", message=xml_text(_headline(findings))).text = xml_text(
                _details(findings, verdict)
            )
        elif not checks[check]:
            ET.SubElement(case, "skipped", message="nothing to compare")
        yield case


def _headline(findings: list[Finding]) -> str:
    rest = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
    return f"{place(findings[0])}{rest}"


def _details(findings: list[Finding], verdict: Verdict) -> str:
    return "\n".join(as_text(finding_lines(finding, verdict.subject)) for finding in findings)


def xml_text(text: str) -> str:
    """Return text without what XML 1.0 cannot hold."""
    return _NOT_XML.sub("?", text)
