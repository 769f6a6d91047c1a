"""A hook of mkdocs: fills the generated parts of docs/reference, which `<!-- generated: NAME -->` marks.

The commands come from the typer app, the checks and causes from their tables in `tpcheck`, so that no page repeats them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from tpcheck import Topology
from tpcheck.cli import app
from tpcheck.core.causes import Cause
from tpcheck.core.guides import GUIDE_OF_CHECK

_MARK = re.compile(r"<!-- generated: (\w+) -->")
# What an advice that depends on the finding says for one such finding.
_EXAMPLE = {"generators": ["torch"], "where": "workers"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the text of each mark in its place (called by mkdocs for every page)."""
    return _MARK.sub(lambda mark: "\n".join(GENERATED[mark.group(1)]()), markdown)


def commands() -> Iterator[str]:
    """Yield a section for each command: what its `--help` says."""
    command: Any = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="tpcheck")
    examples = re.compile(r"(?:^tpcheck .*\n)+", re.MULTILINE)  # their paragraphs are marked by a \b that is lost
    yield examples.sub(lambda lines: f"```text\n{lines.group()}```\n", text[text.index("## `") :])


def checks() -> Iterator[str]:
    """Yield a line for each check with the guide that its findings lead to."""
    for check, guide in GUIDE_OF_CHECK.items():
        yield f"- `{check}`: [{guide.value}](../guides/{guide.value}.md)"


def causes() -> Iterator[str]:
    """Yield a section for each cause: what its test has shown, what to change, where the test is."""
    for cause in Cause:
        yield from [f"### {cause.slug}", "", f"{_sentence(cause)}", ""]
        if (advice := cause.advise(_EXAMPLE, Topology(tp=2, dp=2))) is not None:
            yield from [f"**What to change.** {advice}", ""]
        if cause.guide is not None:
            yield from [f"**Read on.** [{cause.guide.value}](../guides/{cause.guide.value}.md)", ""]
        yield from ["**Tested in** " + ", ".join(f"`tpcheck.{module}`" for module in cause.diagnosed_in) + ".", ""]


def _sentence(cause: Cause) -> str:
    text = cause.sentence.format(residual="")
    return f"{text[0].upper()}{text[1:]}."


GENERATED: dict[str, Callable[[], Iterator[str]]] = {"commands": commands, "checks": checks, "causes": causes}
