"""What a package index and a plain installation show: version, links, help, and what to install for an extra."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tpcheck
from tpcheck.cli import app

ROOT = Path(__file__).parents[1]
EXTRAS = ("accelerate", "deepspeed", "hypothesis", "lightning", "megatron", "safetensors", "transformers")
# Run first in a process: these packages are not installed.
BLOCKED = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import importlib.util
real = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.partition(".")[0] in {EXTRAS!r} else real(name, package)
importlib.util.find_spec = find_spec
sys.meta_path.insert(0, Blocked())
"""


def without_extras(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", f"{BLOCKED}\n{program}"], capture_output=True, text=True)


def test_help_and_members_of_the_package_are_complete() -> None:
    assert {name for name, _ in inspect.getmembers(tpcheck)} >= {*tpcheck.__all__, "__version__"}
    assert "verify_family" in pydoc.render_doc(tpcheck)


def test_a_name_whose_extra_is_missing_is_there_and_says_what_to_install_when_it_is_used() -> None:
    program = """
import inspect, pydoc, tpcheck
assert set(tpcheck.__all__) <= {name for name, _ in inspect.getmembers(tpcheck)}
pydoc.render_doc(tpcheck)
assert hasattr(tpcheck, "TpcheckCallback")
from tpcheck import TpcheckCallback
try:
    TpcheckCallback(record="run.trace")
except tpcheck.TpcheckError as error:
    print(error)
"""
    done = without_extras(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "tpcheck.TpcheckCallback: transformers is not installed: pip install 'tpcheck[transformers]'\n"
    )


def test_commands_whose_extra_is_missing_are_bad_usage_and_say_what_to_install() -> None:
    commands = {
        "verify llama --tp 2": "deepspeed",
        "families": "transformers",
        "fuzz llama": "fuzz",
    }
    program = f"""
import io, contextlib
from tpcheck.cli import app
for command in {list(commands)!r}:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        try:
            app(command.split())
        except SystemExit as exit:
            status = exit.code
    print(status, errors.getvalue().strip().replace(chr(10), " "))
"""
    lines = without_extras(program).stdout.splitlines()
    assert len(lines) == len(commands), lines
    for line, extra in zip(lines, commands.values(), strict=True):
        assert line.startswith("2 tpcheck: "), line
        assert f"pip install 'tpcheck[{extra}]'" in line


def test_a_backend_whose_library_is_missing_is_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpcheck.backends import registry

    monkeypatch.setattr(registry, "is_missing", lambda package: package in ("deepspeed", "megatron"))
    for backend, extra in (("deepspeed", "deepspeed"), ("deepspeed-tp-model-init", "deepspeed"), ("megatron",) * 2):
        with pytest.raises(tpcheck.UsageError) as error:
            tpcheck.verify_family("llama", topology=tpcheck.Topology(tp=2), backend=backend)
        assert str(error.value) == (
            f"backend={backend!r}: expected a library that is installed: pip install 'tpcheck[{extra}]'"
        )


@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["verify", "-h"]])
def test_the_usual_options_are_there(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    if arguments == ["--version"]:
        assert result.output == f"tpcheck {tpcheck.__version__}\n"
    if arguments == ["-h"]:
        assert "--install-completion" in result.output


def test_links_of_the_long_description_lead_to_the_repository() -> None:
    namespace: dict[str, object] = {"MetadataHookInterface": object}
    source = (ROOT / "hatch_build.py").read_text()
    exec(source.replace("from hatchling.metadata.plugin.interface import MetadataHookInterface\n", ""), namespace)
    absolute = namespace["with_absolute_links"]
    text = "[a](docs/a.md#b) ![c](docs/c.svg) [d](https://x.org) [e](#e)"
    assert absolute(text, "https://r") == (  # type: ignore[operator]
        "[a](https://r/blob/main/docs/a.md#b) ![c](https://r/raw/main/docs/c.svg) [d](https://x.org) [e](#e)"
    )


def test_every_extra_that_is_named_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    from tpcheck.core.extras import install_command

    for package in EXTRAS:
        command = install_command(package)
        assert command is not None
        assert f"\n{command.partition('[')[2].partition(']')[0]} = [" in text
