"""Hooks of mkdocs and mkdocstrings for docs/reference: what the code says of itself, so that no page repeats it.

`<!-- generated: NAME -->` in a page is replaced by what `GENERATED` yields: the commands come from the typer app, the
checks and causes from their tables.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import griffe
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
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="tpcheck").replace("\b", "")
    examples = re.compile(r"(?:^tpcheck .*\n)+", re.MULTILINE)
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


class ShownAsInHelp(griffe.Extension):
    """Shows functions as `help` does: those that take `**options` with the options by name, examples as code."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if not any("Unpack" in str(parameter.annotation) for parameter in func.parameters):
            return
        try:
            shown = import_module(func.module.path)
        except ImportError:  # of an extra, such as lightning
            return
        for name in func.path.removeprefix(f"{func.module.path}.").split("."):
            shown = getattr(shown, name)
        func.parameters = griffe.Parameters(*map(_griffe_parameter, inspect.signature(shown).parameters.values()))
        if func.docstring is not None:
            func.docstring.value = _with_examples(inspect.cleandoc(shown.__doc__ or ""))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _with_examples(obj.docstring.value)


def _with_examples(docstring: str) -> str:
    """Return a docstring with the title of the section in which griffe looks for code."""
    return re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)


def _griffe_parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    annotation = getattr(parameter.annotation, "__forward_arg__", parameter.annotation)
    kind = griffe.ParameterKind[parameter.kind.name.lower()]
    default = None if parameter.default is inspect.Parameter.empty else repr(parameter.default)
    shown = None if annotation is inspect.Parameter.empty else str(annotation)
    return griffe.Parameter(parameter.name, annotation=shown, kind=kind, default=default)
