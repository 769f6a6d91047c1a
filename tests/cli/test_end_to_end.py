"""The command line on real ranks and the real DeepSpeed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.schema import document

for package in ("torch", "deepspeed", "transformers"):
    pytest.importorskip(package)


def tpcheck(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tpcheck", *arguments], cwd=cwd, capture_output=True, text=True)


def test_a_correct_family_passes_and_reports_what_was_compared(tmp_path: Path) -> None:
    files = "--json report.json --junit report.xml --html report.html".split()
    done = tpcheck("verify", "llama", "--tp", "2", *files, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("passed  llama  deepspeed, tp=2, float64, 2 steps, seed 0\n")
    report = document(tmp_path / "report.json", "report")
    assert report["verdict"] == "passed"
    assert report["coverage"]["compared"] == report["coverage"]["total"] > 0
    assert all(check["compared"] > 0 and check["worst_margin"] < 0.2 for check in report["checks"])
    for margins in report["margins"].values():
        assert set(margins) >= {"model.layers.1.mlp.down_proj", "lm_head", ""}
        assert all(margin < 0.2 for margin in margins.values())
    assert re.search(r"\n      layers\.\{0-1\} +\S+ +\S+  worst of \d+ modules\n", done.stdout)
    assert ">down_proj</span>" in (tmp_path / "report.html").read_text()
    assert set(report["environment"]) >= {"torch", "deepspeed", "transformers"}


def test_a_wrong_family_fails_with_a_command_that_reproduces_it(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*"verify phi --tp 2 --set qk_layernorm=true --json report.json".split())
    assert done.exit_code == 1, done.output
    first = document(tmp_path / "report.json", "report")["findings"][0]
    assert first["check"] == "gradients_match_reference"
    assert first["margin"] > 1e3
    assert first["evidence"]["error_map"]["shards"][0]["ranks"] == [0, 1]
    assert re.search(r" {8,}q_layernorm .* first wrong\n", done.stdout)
    assert f"  again     {first['again']}\n" in done.stdout
    program, *arguments = shlex.split(first["again"])
    rerun = run(*arguments, "--json", "again.json")
    assert (program, rerun.exit_code) == ("tpcheck", 1)
    assert document(tmp_path / "again.json", "report")["findings"][0] == first


@pytest.mark.parametrize("reached", ["tpcheck-*", pytest.param("tpcheck-resume-*", marks=pytest.mark.slow)])
def test_a_command_that_is_terminated_leaves_nothing(reached: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # paths of sockets must be short
        command = "-m tpcheck verify llama --tp 2 --checks resume_matches_uninterrupted".split()
        environ = {**os.environ, "TMPDIR": folder}
        with subprocess.Popen([sys.executable, *command], env=environ, stderr=subprocess.PIPE, text=True) as process:
            while not list(Path(folder).glob(reached)) and process.poll() is None:
                time.sleep(0.05)
            process.terminate()
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, errors
        assert "Traceback" not in errors
        assert not list(Path(folder).glob("tpcheck-*"))


def test_a_crash_does_not_end_the_run_of_other_families(run: Callable[..., Any]) -> None:
    done = run(*"verify phi3 opt --tp 2 --jobs 2".split())
    assert done.exit_code == 3, done.output
    assert "The system under test crashed. Its own message:\n" in done.stdout
    assert done.stdout.endswith("1 passed, 1 error (1 known)\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("lama", "tpcheck: family='lama': expected a language model type of transformers; did you mean llama"),
        ("llama --set num_layer=3", "tpcheck: set='num_layer': expected an attribute of LlamaConfig; did you mean"),
        ("llama --backend nope", "tpcheck: backend='nope': expected one of"),
        ("llama --dtype int8", "tpcheck: dtype='int8': expected one of float64"),
    ],
)
def test_bad_usage_is_one_sentence(run: Callable[..., Any], arguments: str, sentence: str) -> None:
    done = run("verify", *shlex.split(arguments))
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(sentence)
    assert len([line for line in done.stderr.splitlines() if not line.startswith("read on: ")]) == 1
    assert done.stdout == ""
