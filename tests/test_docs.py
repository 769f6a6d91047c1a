"""What the documentation says is so: paths and links lead somewhere, commands and names exist, snippets run.

A comment above a block of code says how it is tested; without one, its commands and names must exist.

    <!-- test: runs -->                       it is run, with a data set and a report in reach
    <!-- test: runs on tp=2 -->               on both ranks of a world, with a DeepSpeed engine and the like in reach
    <!-- test: raises NAME on tp=2 -->        the same, and ends in this error of tpcheck's
    <!-- test: prints -->                     it is what the command before it prints
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tpcheck
from tests.snippets import Snippet, names_that_do_not_exist, snippets, unknown_options
from tpcheck.cli import app
from tpcheck.core.guides import Guide

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]
_PATH = re.compile(r"`((?:[a-z_]+/)+[a-z_]*(?:\.[a-z]+)?)(?:`| )")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def paths() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        if page.name == "compared.md":  # names files of other projects
            continue
        for path in dict.fromkeys(_PATH.findall(page.read_text())):
            if page.name in ("architecture.md", "CONTRIBUTING.md") or path.startswith(
                ("tpcheck/", "tests/", "docs/", "ci/")
            ):
                yield page.name, path


@pytest.mark.parametrize(("page", "path"), list(paths()))
def test_a_path_exists(page: str, path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "tpcheck" / path).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


def test_architecture_has_a_paragraph_for_each_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = [path.name for path in (ROOT / "tpcheck").iterdir() if (path / "__init__.py").exists()]
    assert [folder for folder in folders if f"`{folder}/`" not in text] == []


def named(test: str, language: str | None = None) -> Any:
    """Return the snippets with this test as parameters."""
    chosen = [each for each in SNIPPETS if each.test == test or (test == "" and each.language == language)]
    return pytest.mark.parametrize("snippet", chosen, ids=lambda snippet: snippet.name)


def test_every_test_of_a_snippet_is_known() -> None:
    known = re.compile(r"(names exist|verified with --backend custom|prints|runs( on tp=2)?|raises \w+ on tp=2)")
    assert [each.name for each in SNIPPETS if each.test is not None and not known.fullmatch(each.test)] == []


@named("", "sh")
def test_commands_have_options_that_exist(snippet: Snippet) -> None:
    assert [line for line in snippet.commands if unknown_options(line)] == []


@named("", "yaml")
def test_commands_of_a_workflow_have_options_that_exist(snippet: Snippet) -> None:
    lines = [line for line in _strings(yaml.safe_load(snippet.text)) if line.startswith("tpcheck ")]
    assert lines
    assert [line for line in lines if unknown_options(line)] == []


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


@named("", "python")
def test_names_of_a_snippet_exist(snippet: Snippet) -> None:
    assert names_that_do_not_exist(snippet.text) == []


@named("prints")
def test_a_command_prints_what_the_page_shows(snippet: Snippet) -> None:
    before = [each for each in SNIPPETS if each.page == snippet.page and each.line < snippet.line][-1]
    _, *arguments = shlex.split(before.commands[-1])
    assert CliRunner().invoke(app, arguments).output.strip("\n") == snippet.text.strip("\n")


@named("runs")
def test_a_snippet_runs(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(snippet.text, snippet.name, {"dataset": range(8), "dp": 2, "dp_rank": 0, **_report()})


def _report() -> dict[str, Any]:
    from tests.report.examples import FAILED
    from tpcheck.report import Report

    return {"report": Report(FAILED)}


def run(text: str, name: str, namespace: dict[str, Any]) -> None:
    """Run a snippet; its file in a traceback is its place in the page."""
    exec(compile(text, name, "exec"), {"__name__": "documentation", "tpcheck": tpcheck, **namespace})


@pytest.mark.tpcheck(tp=2, timeout=120)
def test_snippets_run_on_ranks(tp_rank: tpcheck.Rank, tmp_path: Path) -> None:
    """One world and one engine for the snippets of all pages, since they are small."""
    from tests.engine_of_docs import stand_ins

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        names = stand_ins()
        for snippet in [each for each in SNIPPETS if each.test == "runs on tp=2"]:
            run(snippet.text, snippet.name, {**names})


SCRIPTS = [snippet for snippet in SNIPPETS if (snippet.test or "").startswith("raises ")]


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
@pytest.mark.tpcheck(tp=2, timeout=120)
def test_a_script_ends_in_the_error_that_the_page_shows(number: int, tp_rank: tpcheck.Rank) -> None:
    script = SCRIPTS[number]
    with pytest.raises(getattr(tpcheck, str(script.test).split()[1])) as error:
        run(script.text, script.name, {})
    shown = next(
        each for each in SNIPPETS if each.page == script.page and each.line > script.line and "  cause" in each.text
    )
    finding = shown.text[shown.text.index("  where") :]
    assert finding in error.value.report.to_text()


@pytest.mark.parametrize("guide", Guide)
def test_a_guide_that_messages_name_exists(guide: Guide) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    documentation, _, page = guide.url.rpartition("/guides/")
    assert f'Documentation = "{documentation}"' in pyproject
    assert (ROOT / "docs" / "guides" / page).exists()
