"""What the documentation says is so: paths and links lead somewhere, commands and names exist, snippets run.

A comment above a block of code says how it is tested. Without one, its names must exist, and it is in a table of what
is not run. Commands run, too: those that train with `-m slow`.

    <!-- test: runs -->                       it is run, with a data set and a report in reach
    <!-- test: runs on tp=2 -->               on both ranks of a world, with a DeepSpeed engine and the like in reach;
                                              tests that it defines are called there
    <!-- test: raises NAME on tp=2 -->        the same, and ends in this error of tpcheck's
    <!-- test: verified with --backend custom -->  it is the file of a test in tests/model/test_targets.py
    <!-- test: prints -->                     it is what the command before it prints
"""

from __future__ import annotations

import json
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


NOT_RUN = {
    "README.md: def shard(model, rank):  # without it, DeepSpeed's AutoTP shards": "outline of guides/own-model.md",
    "backends.md: def build():": "needs megatron-core, whose backend has tests of its own",
    'backends.md: def shard(model, rank):  # in place, on every rank; rank.group("tp"), rank.topology, rank.rank': (
        "outline; guides/own-model.md is whole"
    ),
    "backends.md: from tpcheck.backends.custom import CustomBackend": "outline; tests/backends/test_custom.py runs it",
    "backends.md: from tpcheck.testing import require_conformance": "needs a backend of the reader's",
    'checkpoints.md: report = tpcheck.verify_checkpoint("saved/", "reference/", dtype=None, earlier=["step1/"])': (
        "needs checkpoints; tests/checkpoints runs it"
    ),
    "faults.md: def _reduce_skipped(draw: Draw) -> Injection:": "a row of tpcheck/lab/faults/linear.py",
    "runs.md: tpcheck.record(": "needs a model of ten layers",
    "start.md: noise = torch.Generator().manual_seed(rank // TP)  # dp_rank; in place of torch.manual_seed(rank)": (
        "lines of the script above them: test_the_mended_script_trains puts them there"
    ),
}
"""Python that is not run: its page and first line, and why."""


def test_python_that_is_not_run_is_in_the_table() -> None:
    not_run = [each for each in SNIPPETS if each.language == "python" and each.test is None]
    assert {f"{each.page.name}: {each.text.splitlines()[0]}" for each in not_run} == set(NOT_RUN)


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
    run(snippet.text, snippet.name, {"pytest": pytest, "dataset": range(8), "dp": 2, "dp_rank": 0, **_report()})


def _report() -> dict[str, Any]:
    from tests.report.examples import FAILED
    from tpcheck.report import Report

    return {"report": Report(FAILED)}


def run(text: str, name: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run a snippet, and return its names; its file in a traceback is its place in the page."""
    names = {"__name__": "documentation", "tpcheck": tpcheck, **namespace}
    exec(compile(text, name, "exec"), names)
    return names


@pytest.mark.tpcheck(tp=2, timeout=120)
def test_snippets_run_on_ranks(tp_rank: tpcheck.Rank, tmp_path: Path) -> None:
    """One world and one engine for the snippets of all pages, since they are small."""
    import torch

    from tests.engine_of_docs import stand_ins

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        names = stand_ins()
        for snippet in [each for each in SNIPPETS if each.test == "runs on tp=2"]:
            defined = run(snippet.text, snippet.name, {"pytest": pytest, **names})
            for test in [value for name, value in defined.items() if name.startswith("test_")]:
                torch.manual_seed(0)
                test(tp_rank)


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


@pytest.mark.slow
@pytest.mark.tpcheck(tp=2, timeout=300)
def test_the_mended_script_trains(tp_rank: tpcheck.Rank) -> None:
    (script,) = SCRIPTS
    lines = script.text.splitlines()
    mended = next(each for each in SNIPPETS if each.page == script.page and "noise = torch.Generator()" in each.text)
    noise, dropped = mended.text.splitlines()
    seeded = next(number for number, line in enumerate(lines) if line.startswith("torch.manual_seed(rank)"))
    drops = next(number for number, line in enumerate(lines) if line.startswith("    dropped = "))
    lines[seeded], lines[drops] = noise, f"    {dropped}"
    run("\n".join(lines), script.name, {})


COMMAND_LINES = sorted({shlex.join(shlex.split(line, comments=True)) for each in SNIPPETS if each.language == "sh"
                        for line in each.commands})  # fmt: skip
COMMANDS_NOT_RUN = {
    "tpcheck checkpoint": "needs checkpoints; tests/cli/test_checkpoint.py runs it",
    "tpcheck compare": "needs traces; tests/runs/test_comparing.py runs it",
    "tpcheck faults": "minutes; ci/faults runs it",
    "tpcheck fuzz": "minutes; ci/fuzz runs it",
    "tpcheck verify --all": "an hour; docs/families.md is made of it",
}
"""How commands start that are not run, except `tpcheck faults --list`, and why. Of others than tpcheck's, CI runs those
of ci/ and the README's first two, and the script of docs/start.md is run above."""


def commands(*, that_train: bool) -> Any:
    run = [line for line in COMMAND_LINES if not line.startswith(tuple(COMMANDS_NOT_RUN)) or line.endswith("--list")]
    chosen = [line for line in run if line.startswith("tpcheck verify") == that_train]
    assert chosen
    return pytest.mark.parametrize("line", chosen)


@pytest.fixture
def folder_of_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that has the files which pages speak of."""
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "num_hidden_layers": 36}
    config = {"gradient_clipping": 1.0, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
    own = next(each for each in SNIPPETS if (each.test or "").startswith("verified with"))
    monkeypatch.chdir(tmp_path)
    Path("ds_config.json").write_text(json.dumps(config))
    Path("mymodel.py").write_text(own.text)
    Path("my-model").mkdir()
    Path("my-model/config.json").write_text(json.dumps({"model_type": "qwen3", **sizes}))


@commands(that_train=False)
def test_a_command_runs(line: str, folder_of_docs: None) -> None:
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code in (0, 1), done.output


@pytest.mark.slow
@commands(that_train=True)
def test_a_verification_comes_to_a_verdict(line: str, folder_of_docs: None) -> None:
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    registered_crash = done.exit_code == 3 and re.search(r"^  upstream  \S+: ", done.output, re.MULTILINE)
    assert done.exit_code in (0, 1) or registered_crash, done.output


@pytest.mark.parametrize("guide", Guide)
def test_a_guide_that_messages_name_exists(guide: Guide) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    documentation, _, page = guide.url.rpartition("/guides/")
    assert f'Documentation = "{documentation}"' in pyproject
    assert (ROOT / "docs" / "guides" / page).exists()
