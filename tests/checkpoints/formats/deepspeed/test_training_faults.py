"""Faults in the files of some ranks are found and explained, in real DeepSpeed checkpoints."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.samples import Sample, Samples
from tpcheck import CheckpointError, Report, verify_checkpoint

Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
SHARDED = 15  # of the 21 parameters of the small Llama


@contextmanager
def edited(file: Path) -> Iterator[Any]:
    """Yield the contents of a file, and write them back."""
    saved = torch.load(file, weights_only=False)
    yield saved
    torch.save(saved, file)


def copied(sample: Sample, folder: Path) -> Path:
    return Path(shutil.copytree(sample.folder, folder / "copy"))


def rank_file(folder: Path, rank: int) -> Path:
    (file,) = folder.glob(f"**/mp_rank_{rank:02}_model_states.pt")
    return file


def causes(report: Report) -> Counter[str | None]:
    return Counter(finding.cause for finding in report.findings)


def with_module(change: Callable[[dict[str, torch.Tensor]], None], rank: int = 1) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with edited(rank_file(folder, rank)) as saved:
            change(saved["module"])

    return edit


def swap_ranks(folder: Path) -> None:
    first, second = rank_file(folder, 0), rank_file(folder, 1)
    with edited(first) as ours, edited(second) as theirs:
        ours["module"], theirs["module"] = theirs["module"], ours["module"]


def copy_rank_0(folder: Path) -> None:
    with edited(rank_file(folder, 0)) as ours, edited(rank_file(folder, 1)) as theirs:
        theirs["module"] = ours["module"]


def _zeroed(module: dict[str, torch.Tensor]) -> None:
    module[Q].zero_()


def _of_layer_0(module: dict[str, torch.Tensor]) -> None:
    module[Q] = module[Q.replace("layers.1", "layers.0")]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (swap_ranks, {"shard_order_swapped": SHARDED}),
        (copy_rank_0, {"shard_repeated": SHARDED}),
        (with_module(_zeroed), {"all_zero": 1}),
    ],
    ids=["swapped", "copied", "zero"],
)
def test_faults_of_shards_are_explained(
    samples: Samples, edit: Callable[[Path], None], expected: dict[str, int], tmp_path: Path
) -> None:
    sample = samples.training()
    folder = copied(sample, tmp_path)
    edit(folder)
    report = verify_checkpoint(folder, sample.reference)
    assert causes(report) == expected
    if len(report.findings) == 1:
        (finding,) = report.findings
        assert finding.where["parameter"] == Q
        assert finding.where["index"][0] >= 32  # of 64 rows, those of rank 1


def test_a_tensor_of_another_layer_on_both_ranks_is_explained(samples: Samples, tmp_path: Path) -> None:
    sample = samples.training()
    folder = copied(sample, tmp_path)
    for rank in (0, 1):
        with_module(_of_layer_0, rank)(folder)
    (finding,) = verify_checkpoint(folder, sample.reference).findings
    assert (finding.where["parameter"], finding.cause) == (Q, "tensor_of_another_layer")


def test_a_shard_of_an_earlier_step_is_explained(samples: Samples, tmp_path: Path) -> None:
    before, after = samples.training(steps=1), samples.training(steps=2)
    folder = copied(after, tmp_path)
    with edited(rank_file(before.folder, 1)) as old, edited(rank_file(folder, 1)) as new:
        new["module"][Q] = old["module"][Q]
    (finding,) = verify_checkpoint(folder, after.reference, earlier=[before.folder]).findings
    assert (finding.where["parameter"], finding.cause) == (Q, "stale_weight")
    assert finding.evidence["story"]["rows"] == [32, 64]


def test_replicas_that_differ_between_ranks_are_found(samples: Samples, tmp_path: Path) -> None:
    sample = samples.training()
    folder = copied(sample, tmp_path)
    with_module(lambda module: module[NORM].mul_(2))(folder)
    report = verify_checkpoint(folder, sample.reference)
    assert not report.passed
    (finding,) = report.findings
    assert (finding.where["parameter"], finding.cause) == (NORM, "replica_drift")


def test_the_file_of_one_rank_is_recognised_as_its_shard(samples: Samples, tmp_path: Path) -> None:
    sample = samples.training()
    module = torch.load(rank_file(sample.folder, 1), weights_only=False)["module"]
    torch.save(module, tmp_path / "pytorch_model.bin")
    report = verify_checkpoint(tmp_path, sample.reference)
    assert causes(report) == {"shard_missing": SHARDED}
    assert {finding.evidence["story"]["tp_rank"] for finding in report.findings} == {1}


def test_a_missing_file_of_a_rank_is_refused(samples: Samples, tmp_path: Path) -> None:
    sample = samples.training()
    folder = copied(sample, tmp_path)
    rank_file(folder, 1).unlink()
    with pytest.raises(CheckpointError, match="model states of 1 mp ranks, but was saved with mp_world_size 2"):
        verify_checkpoint(folder, sample.reference)


def test_stale_master_weights_of_one_partition_are_found(samples: Samples, tmp_path: Path) -> None:
    before, after = samples.training(zero=1, dp=2, steps=1), samples.training(zero=1, dp=2, steps=2)
    folder = copied(after, tmp_path)
    name = "*zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (old,), (new,) = before.folder.glob(f"**/{name}"), folder.glob(f"**/{name}")
    shutil.copy(old, new)
    report = verify_checkpoint(folder, after.reference, earlier=[before.folder])
    assert not report.passed
    # a parameter that lies in both partitions is partly stale; replicas are stale on mp rank 0 alone
    assert set(causes(report)) <= {"stale_weight", "replica_drift", None}
    assert causes(report)["stale_weight"]
    assert causes(report)["replica_drift"]


def test_a_zeroed_tensor_of_a_universal_checkpoint_is_explained(samples: Samples, tmp_path: Path) -> None:
    sample = samples.universal(zero=1, dp=2, steps=2)
    folder = Path(shutil.copytree(sample.folder, tmp_path / "universal"))
    with edited(folder / "zero" / Q / "fp32.pt") as saved:
        (saved["param"] if isinstance(saved, dict) else saved).data.zero_()
    (finding,) = verify_checkpoint(folder, sample.reference).findings
    assert (finding.where["parameter"], finding.cause) == (Q, "all_zero")
