"""Checkpoints are opened by the right format, and every tensor is compared or counted as not compared."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.numerics.exact.tensors import Tensors
from tpcheck import CheckpointError, UsageError, verify_checkpoint
from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.comparison import Comparison, compare_checkpoints, map_in_threads, open_checkpoint

A, B = torch.arange(6.0).reshape(3, 2), torch.arange(4.0)
WHOLE = Tensors({"a": A, "b": B})


def found(comparison: Comparison) -> dict[str, str | None]:
    return {finding.where["parameter"]: finding.cause for finding in comparison.findings}


def test_equal_checkpoints_have_no_findings() -> None:
    comparison = compare_checkpoints(WHOLE, WHOLE)
    assert not comparison.findings
    assert (comparison.coverage.compared, comparison.coverage.total) == (2, 2)


@pytest.mark.parametrize("which", ["actual", "expected", "earlier"])
def test_a_checkpoint_that_changes_while_it_is_compared_is_an_error(which: str) -> None:
    changed = replace(WHOLE, has_changed=True)
    sides = {side: changed if side == which else WHOLE for side in ("actual", "expected", "earlier")}
    with pytest.raises(CheckpointError, match="changed while they were read"):
        compare_checkpoints(sides["actual"], sides["expected"], earlier={"step 1": sides["earlier"]})


def test_progress_ends_with_all_bytes() -> None:
    calls: list[tuple[int, int]] = []
    compare_checkpoints(WHOLE, WHOLE, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (40, 40)


def test_what_cannot_be_read_is_not_compared_and_not_missing() -> None:
    actual = Tensors({"a": A}, unread={"b": "it is sparse"})
    comparison = compare_checkpoints(actual, WHOLE)
    assert not comparison.findings
    assert (comparison.coverage.compared, comparison.coverage.total) == (1, 2)
    assert comparison.coverage.not_compared == {"b of actual": "it is sparse"}


def test_tensors_that_only_one_side_has_are_findings() -> None:
    assert found(compare_checkpoints(Tensors({"a": A}), WHOLE)) == {"b": "tensor_missing"}
    assert found(compare_checkpoints(WHOLE, Tensors({"a": A}))) == {"b": "tensor_unexpected"}


def test_replicas_that_differ_are_a_finding() -> None:
    actual = Tensors({"a": A}, inconsistent_replicas={"b": "ranks 0 and 1 differ", "optimizer": "ranks differ"})
    comparison = compare_checkpoints(actual, WHOLE)
    assert found(comparison) == {"b": "replica_drift"}
    assert comparison.findings[0].evidence["story"] == {"ranks": "ranks 0 and 1 differ"}


def test_replicas_of_the_reference_that_differ_are_not_compared() -> None:
    comparison = compare_checkpoints(WHOLE, Tensors({"a": A}, inconsistent_replicas={"b": "ranks 0 and 1 differ"}))
    assert not comparison.findings
    assert comparison.coverage.not_compared == {"b of the reference": "ranks 0 and 1 differ"}


def test_a_tensor_of_another_dtype_is_rounded_or_explained_after_rounding() -> None:
    fine = replace(WHOLE, tensors={"a": A + 1e-3, "b": B})
    same_values = compare_checkpoints(Tensors({"a": A.half(), "b": B}), WHOLE)
    assert found(same_values) == {"a": None}
    assert same_values.findings[0].evidence["same_values"] is True
    assert found(compare_checkpoints(Tensors({"a": fine.tensors["a"].half(), "b": B}), fine)) == {"a": "dtype_rounded"}
    zeros = compare_checkpoints(Tensors({"a": torch.zeros(3, 2).half(), "b": B}), fine)
    assert found(zeros) == {"a": "all_zero"}
    shard = compare_checkpoints(Tensors({"a": fine.tensors["a"][:2].half(), "b": B}), fine)
    assert found(shard) == {"a": "shard_missing"}
    assert found(compare_checkpoints(Tensors({"a": A + 0.5, "b": B}), Tensors({"a": A.int(), "b": B}))) == {"a": None}


def test_a_finding_names_shapes_and_dtypes_that_differ() -> None:
    (finding,) = compare_checkpoints(Tensors({"a": A[:2].half(), "b": B}), WHOLE).findings
    expected = {
        "shape_actual": [2, 2], "shape_expected": [3, 2], "dtype_actual": "float16", "dtype_expected": "float32",
        "same_values": False,
    }  # fmt: skip
    assert expected.items() <= finding.evidence.items()
    assert finding.observed == 6
    (finding,) = compare_checkpoints(Tensors({"a": A + 0.37, "b": B}), WHOLE).findings
    assert not {"shape_actual", "dtype_actual", "same_values", "actual_name", "story"} & finding.evidence.keys()


def test_a_finding_has_the_advice_and_the_evidence_of_its_cause() -> None:
    (finding,) = compare_checkpoints(Tensors({"a": A, "b": B * 2}), WHOLE).findings
    assert finding.cause == "duplicate_reduce"
    assert finding.evidence["story"] == {"factor": 2, "rows": [1, 4]}
    assert finding.evidence["advice"]


def test_complex_values_are_shown_as_text() -> None:
    (finding,) = compare_checkpoints(Tensors({"a": A + 1j}), Tensors({"a": A + 2j})).findings
    assert (finding.evidence["actual"], finding.evidence["expected"]) == ("1j", "2j")


def test_a_tensor_that_one_side_lacks_names_the_side_that_has_it() -> None:
    (missing,) = compare_checkpoints(Tensors({"a": A}), WHOLE).findings
    (unexpected,) = compare_checkpoints(WHOLE, Tensors({"a": A})).findings
    assert (missing.evidence["only_in"], unexpected.evidence["only_in"]) == ("reference", "actual")


def test_a_tie_to_a_tensor_that_differs_too_is_no_explanation() -> None:
    tied = Tensors({"a": A, "b": A}, ties=(frozenset({"a", "b"}),))
    differing = Tensors({"a": A + 0.37, "b": A + 0.73})
    assert found(compare_checkpoints(differing, tied)) == {"a": None, "b": None}


def test_a_tied_weight_that_differs_from_its_partner_is_untied() -> None:
    tied = Tensors({"a": A, "b": A}, ties=(frozenset({"a", "b"}),))
    assert found(compare_checkpoints(Tensors({"a": A, "b": torch.randn(3, 2)}), tied)) == {"b": "tied_weight_untied"}


def test_findings_hold_what_differs_and_the_number_of_tensors() -> None:
    changed = A.clone()
    changed[1, 1] = -7
    (finding,) = compare_checkpoints(Tensors({"a": changed, "b": B}), WHOLE).findings
    assert finding.where == {"parameter": "a", "index": [1, 1]}
    assert finding.observed == 1
    expected = {"count_differing": 1, "count_total": 6, "actual": -7.0, "expected": 3.0, "largest": 10.0}
    assert expected.items() <= finding.evidence.items()
    assert finding.evidence["count_tensors"] == 2


def test_a_path_without_a_checkpoint_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for source, message in (
        (tmp_path / "nowhere", "actual='.*nowhere': expected a file or folder that exists"),
        ("a\0b", "expected a file or folder that can be read"),
        (tmp_path, r"expected a checkpoint \(.*safetensors.*\); the folder holds notes\.txt"),
        (3, "actual='int': expected a path, a torch.nn.Module or a dict of tensors"),
    ):
        with pytest.raises(UsageError, match=message):
            open_checkpoint("actual", source, ReadOptions())
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(CheckpointError, match=r"is an empty folder\.$"):
        open_checkpoint("actual", tmp_path, ReadOptions())


def test_a_folder_of_checkpoints_names_them(tmp_path: Path) -> None:
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"a": A}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(UsageError, match=r"holds a checkpoint itself; below it are checkpoint-10, checkpoint-5$"):
        open_checkpoint("actual", tmp_path, ReadOptions())
    hub = tmp_path / "models--org--name"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    (tmp_path / "checkpoint-5").rename(hub / "snapshots" / "abc")
    with pytest.raises(UsageError, match=r"below it are snapshots/abc$"):
        open_checkpoint("actual", hub, ReadOptions())


def test_a_folder_with_two_kinds_of_weights_says_which_is_read(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    torch.save({"a": B}, tmp_path / "pytorch_model.bin")
    report = verify_checkpoint(tmp_path, {"a": A})
    assert report.passed
    expected = {"pytorch weights of actual": "safetensors is read where a folder holds both"}
    assert report.verdict.coverage.not_compared == expected


def test_values_are_mapped_in_threads_and_drawn_as_they_are_needed() -> None:
    drawn = []

    def values() -> Iterator[int]:
        for value in range(1000):
            drawn.append(value)
            yield value

    results = map_in_threads(lambda value: (value * 2, threading.current_thread()), values(), 2)
    first, (doubled, thread) = next(results)
    assert doubled == 2 * first
    assert thread is not threading.main_thread()
    assert len(drawn) < 1000
    assert sum(result for _, (result, _) in results) == sum(range(0, 2000, 2)) - doubled


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(lambda value: 1 // value, iter(range(100)), 2))
