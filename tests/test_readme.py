"""The README shows what exists, and its two commands are what CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.snippets import COMMANDS, unknown_options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL_LINES = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SETUP_LINES = [line for line in SHELL_LINES if line.startswith("python3 -m venv .venv && ")]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_a_line_in_the_readme(command: str) -> None:
    assert any(line.startswith(f"tpcheck {command}") for line in SHELL_LINES)


@pytest.mark.parametrize("line", [line for line in SHELL_LINES if line.startswith("tpcheck ")])
def test_every_line_of_the_readme_is_a_command_with_options_that_exist(line: str) -> None:
    assert not unknown_options(line)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_two_commands_start_from_a_bare_clone() -> None:
    verify, test = SETUP_LINES
    assert verify.endswith(".venv/bin/tpcheck verify llama --tp 2")
    assert test.endswith("ci/test")


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    install = re.search(r"\.venv/bin/pip (install .*?) && ", SETUP_LINES[1])
    assert install
    run = (ROOT / ".ci" / "run").read_text()
    assert install.group(1) in run
    assert run.index("ci/check") < run.index("ci/test")


def test_the_finding_in_the_readme_is_one_that_reports_make() -> None:
    from tests.report.examples import GRADIENT, SUBJECT
    from tpcheck.report.findings import finding_lines
    from tpcheck.report.words import as_text

    assert as_text(finding_lines(GRADIENT, SUBJECT)) in README
