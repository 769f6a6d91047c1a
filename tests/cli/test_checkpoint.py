"""`tpcheck checkpoint` on real files: exit status, what it prints and writes, one sentence for every bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.hostile import HOSTILE
from tests.schema import document

Run = Callable[..., Any]
TENSORS = {"a.weight": torch.arange(12.0).reshape(6, 2), "b.weight": torch.ones(3)}


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    folder = tmp_path / "reference"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    return str(folder)


def test_equal_checkpoints_pass(run: Run, reference: Path, tmp_path: Path) -> None:
    result = run("checkpoint", saved(tmp_path / "saved", TENSORS), str(reference))
    assert result.exit_code == 0
    assert "2 of 2 tensors compared" in result.stdout


def test_a_saved_shard_is_reported_and_written(run: Run, reference: Path, tmp_path: Path) -> None:
    actual = saved(tmp_path / "saved", {**TENSORS, "a.weight": TENSORS["a.weight"][:3]})
    files = ["--json", str(tmp_path / "report.json"), "--html", str(tmp_path / "report.html")]
    result = run("checkpoint", actual, str(reference), *files)
    assert result.exit_code == 1
    assert "shard_missing: the tensor is TP rank 0's slice of the reference along dim 0, of 2 ranks" in result.stdout
    assert f"again     tpcheck checkpoint {actual} {reference}" in result.stdout
    assert "TP rank 0&#39;s slice of the reference" in (tmp_path / "report.html").read_text()
    report = document(tmp_path / "report.json", "report")
    (finding,) = report["findings"]
    assert (report["schema"], report["verdict"], finding["cause"]) == (1, "failed", "shard_missing")
    assert finding["where"]["parameter"] == "a.weight"


def test_checkpoints_without_tensors_have_not_passed(run: Run, tmp_path: Path) -> None:
    empty = saved(tmp_path / "saved", {})
    result = run("checkpoint", empty, empty)
    assert result.exit_code == 2
    assert "passed" not in result.output


def test_an_intended_cast_and_earlier_steps_are_options(run: Run, reference: Path, tmp_path: Path) -> None:
    cast = saved(tmp_path / "saved", {name: tensor.bfloat16() for name, tensor in TENSORS.items()})
    assert run("checkpoint", cast, str(reference)).exit_code == 1
    assert run("checkpoint", cast, str(reference), "--dtype", "bfloat16").exit_code == 0
    old = {**TENSORS, "a.weight": TENSORS["a.weight"] + 0.5}
    stale = saved(tmp_path / "stale", old)
    before = saved(tmp_path / "before", {name: tensor + 0.5 for name, tensor in TENSORS.items()})
    result = run("checkpoint", stale, str(reference), "--earlier", before)
    assert f"stale_weight: the tensor is bitwise equal to {before}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "{reference}"), "actual='nowhere': expected a file or folder that exists"),
        (("{reference}", "nowhere"), "reference='nowhere': expected a file or folder that exists"),
        (("{reference}", "{reference}", "--dtype", "int3"), "dtype='int3': expected one of bfloat16"),
        (("{reference}", "{reference}", "--json", "nowhere/x.json"), "json="),
        (("{empty}", "{reference}"), "is an empty folder"),
        (("{text}", "{reference}"), "expected a checkpoint ("),
    ],
)
def test_bad_usage_is_one_sentence(
    run: Run, reference: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no model")
    names = {"reference": reference, "empty": tmp_path / "empty", "text": tmp_path / "text"}
    result = run("checkpoint", *(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("tpcheck: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


@pytest.mark.parametrize("name", ["header: a gap", "safetensors: a FIFO", "torch: text", "torch: truncated"])
def test_a_hostile_file_is_one_sentence_on_either_side(run: Run, reference: Path, tmp_path: Path, name: str) -> None:
    """`tests/checkpoints/formats/test_hostile.py` reads them all."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    write, message = HOSTILE[name]
    source = str(write(folder))
    for pair in ((source, str(reference)), (str(reference), source)):
        result = run("checkpoint", *pair)
        assert result.exit_code == 2, result.stdout
        assert result.stderr.startswith("tpcheck: ")
        assert re.search(message, result.stderr)
        assert len(result.stderr.splitlines()) == 1
        assert "Traceback" not in result.output


def test_a_file_that_changes_while_it_is_compared_is_no_verdict(reference: Path, tmp_path: Path) -> None:
    from tpcheck import CheckpointError, verify_checkpoint

    actual = tmp_path / "actual.safetensors"
    save_file(TENSORS, actual)

    def change(done: int, total: int) -> None:
        actual.write_bytes(actual.read_bytes() + b"x")

    with pytest.raises(CheckpointError, match="changed"):
        verify_checkpoint(actual, reference, progress=change)
