"""A trace is read as it was written; one that is damaged or incomplete is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs.recordings import OUTPUT, recorded
from tpcheck import TpcheckError, UsageError
from tpcheck.runs.trace import TraceWriter, _as_plain, _as_recorded, read_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    TraceWriter(tmp_path / "x.trace").write(recorded())
    return tmp_path / "x.trace"


def test_a_trace_is_read_as_it_was_written(trace: Path) -> None:
    (actual,), expected = read_trace("reference", trace), recorded()
    assert (actual.rank, actual.topology, actual.dtype) == (0, expected.topology, "float64")
    assert actual.deviations == expected.deviations
    assert (actual.buffers, actual.versions, actual.layouts) == (("b",), {"torch": "2.13.0"}, {})
    for read, written in zip(actual.steps, expected.steps, strict=True):
        assert torch.equal(read.activations[OUTPUT], written.activations[OUTPUT])
        assert (read.loss, read.gradients["unused"], read.weights.keys()) == (1.5, None, written.weights.keys())
    assert [list(names) for names in actual.inputs] == [["0"], ["0", "1.ids"]]


def test_layouts_are_read_as_they_were_written() -> None:
    expected = recorded(tp=2)
    assert _as_recorded(_as_plain(expected)).layouts == expected.layouts


def test_a_trace_without_a_rank_is_incomplete(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "x.trace").write(recorded(tp=2))
    with pytest.raises(TpcheckError, match="holds 1 of the 2 ranks that were recorded"):
        read_trace("actual", tmp_path / "x.trace")


@pytest.mark.parametrize("damage", ["truncated", "a function", "a tensor", "empty", "text"])
def test_a_damaged_trace_is_refused_in_one_sentence(damage: str, trace: Path) -> None:
    file = trace / "rank_00000.pt"
    if damage == "a function":
        torch.save({"facts": print}, file)
    elif damage == "a tensor":
        torch.save(torch.ones(1), file)
    else:
        file.write_bytes({"truncated": file.read_bytes()[:-100], "text": b"no trace"}.get(damage, b""))
    with pytest.raises(TpcheckError, match=r"x\.trace is not a readable trace: \S+") as error:
        read_trace("actual", trace)
    assert "\n" not in str(error.value)


def test_a_path_without_a_trace_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a folder that tpcheck\.record has written"):
        read_trace("actual", tmp_path)


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="a new path"):
        TraceWriter(tmp_path)
    with pytest.raises(UsageError, match="a path whose parent folder exists"):
        TraceWriter(tmp_path / "none" / "x.trace")


def test_an_older_trace_is_replaced(trace: Path) -> None:
    (trace / "rank_00001.pt").write_bytes(b"of an older trace")
    TraceWriter(trace).write(recorded(dtype="float32"))
    assert [rank.dtype for rank in read_trace("actual", trace)] == ["float32"]
