"""Output is plain where it is piped and coloured on a terminal; files are written atomically."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tpcheck.cli import app, terminal
from tpcheck.cli.terminal import phases_shown, write_atomically
from tpcheck.core.check_names import ON_REQUEST
from tpcheck.core.phases import begin_phase


def test_what_a_long_run_does_is_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with phases_shown():
        begin_phase("soon over")
        monkeypatch.setattr(terminal, "_SILENT_S", 0.0)
        begin_phase("saving")
    assert capfd.readouterr() == ("", "tpcheck: 0 s: saving\n")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("old")
    with pytest.raises(TypeError):
        write_atomically(file, b"no text")  # type: ignore[arg-type]
    assert file.read_text() == "old"
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    write_atomically(file, "of \udcff.bin")  # a name that is no text
    assert file.read_text() == "of \\udcff.bin"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_a_device_or_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "tpcheck", "topology", "--world", "4", "--tp", "2"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    message = "tpcheck: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["topology", "--world", "4", "--tp", "2"]])
def test_commands_that_run_nothing_start_fast_and_without_torch(arguments: list[str]) -> None:
    program = f"""
import sys, time
from tpcheck.cli import main
sys.argv = ["tpcheck", *{arguments!r}]
try:
    main()
except SystemExit as end:
    print(end.code, sorted({{"torch", "transformers", "deepspeed"}} & set(sys.modules)), file=sys.stderr)
    assert time.process_time() < 3  # 0.3 s on an idle machine
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"
    assert done.stdout


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("verify", "as many as fit the cores"),
        ("verify", "2x16"),
        ("verify", f"all except {', '.join(ON_REQUEST)}"),
        ("verify", "with --all"),
        ("verify", "$GITHUB_STEP_SUMMARY"),
        ("fuzz", "--known for a family, --no-known for layers"),
        ("faults", "unless a NAME or a kind is given"),
        ("faults", "all"),
    ],
)
def test_help_shows_defaults_that_are_no_values(command: str, default: str) -> None:
    """Rich takes `[default: ...]` in a help text for markup, and leaves it out."""
    help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "250"}).stdout
    assert f"[default: ({default})]" in " ".join(help_text.replace("│", " ").split())


@pytest.mark.parametrize(("extra", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_respected(extra: dict[str, str], coloured: bool) -> None:
    program = "from tpcheck.cli.terminal import show; from tpcheck.report.words import plain; show([plain('x', 'red')])"
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment |= {"FORCE_COLOR": "1", "TERM": "xterm", **extra}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ("\x1b[31m" in done.stdout) == coloured
    assert "x" in done.stdout


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])  # where it is ASCII, click writes UTF-8
def test_characters_outside_of_the_encoding_are_escaped(encoding: str) -> None:
    program = r"""
from tpcheck import cli
from tpcheck.report.words import plain
cli.app = lambda: cli.terminal.show([plain("\u2713 \u00fc \udcff")])
cli.main()
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.stderr == b""
    shown = {
        "latin-1": "\\u2713 \u00fc \\udcff",
        "utf-8": "\u2713 \u00fc \\udcff",
    }
    assert done.stdout == f"{shown[encoding]}\n".encode(encoding)
