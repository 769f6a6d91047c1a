"""A diagnosis as text."""

from __future__ import annotations

from collections.abc import Iterator

from tpcheck.doctor import Diagnosis
from tpcheck.report import words
from tpcheck.report.lines import Line, labelled, plain


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[Line]:
    """Yield what was seen, then what is wrong."""
    versions = (f"{package} {version or 'is not installed'}" for package, version in diagnosis.versions.items())
    yield from labelled("versions", ", ".join(versions))
    yield from labelled("devices", ", ".join(diagnosis.devices))
    if diagnosis.saved:
        yield Line()
        yield plain("what this configuration saves", "bold")
        width = max(len(saved.way) for saved in diagnosis.saved)
        for saved in diagnosis.saved:
            yield Line(((f"  {saved.way:<{width}}  ", ""), (saved.writes, "" if saved.is_model else "yellow")))
    for advice in diagnosis.advice:
        yield Line()
        yield plain(advice.rule, "bold yellow")
        yield from labelled("what", advice.what)
        if advice.fix:
            yield from labelled("fix", advice.fix, "cyan")
        if advice.link:
            yield from labelled("see", advice.link, "dim")
    yield Line()
    if diagnosis.advice:
        yield plain(words.count(len(diagnosis.advice), "finding"), "bold red")
    else:
        yield plain("nothing is wrong", "bold green")
