"""Every fault of a saved model is found, placed and explained, whatever format it is saved in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from tests.checkpoints.faults import FAULTS, Tensors, drawn, earlier, is_tied, reference
from tpcheck import UsageError, verify_checkpoint
from tpcheck.lab.faults.checkpoint import CheckpointFault

Save = Callable[[Tensors, Path], object]


def as_safetensors(tensors: Tensors, folder: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def as_torch_file(tensors: Tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def as_dcp(tensors: Tensors, folder: Path) -> Path:
    dcp.save(dict(tensors), checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def in_memory(tensors: Tensors, folder: Path) -> Tensors:
    return tensors


def saved(save: Save, tensors: Tensors, folder: Path) -> object:
    folder.mkdir(parents=True)
    return save(tensors, folder)


@pytest.mark.parametrize("save", [as_safetensors, in_memory])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_placed_and_explained(save: Save, fault: CheckpointFault, tmp_path: Path) -> None:
    assert_found(fault, save, tmp_path, seed=0)


@pytest.mark.parametrize("seed", range(1, 4))
def test_every_draw_of_a_fault_is_found_placed_and_explained(seed: int, tmp_path: Path) -> None:
    for fault in FAULTS:
        assert_found(fault, in_memory, tmp_path / fault.name, seed)


def assert_found(fault: CheckpointFault, save: Save, folder: Path, seed: int) -> None:
    damage, tied = drawn(fault, seed), is_tied(fault)
    actual = saved(save, damage.apply(reference(tied)), folder / "actual")
    before = saved(save, earlier(tied), folder / "earlier")
    report = verify_checkpoint(actual, reference(tied), earlier=[before])
    assert report.verdict.verdict == "failed"
    assert {finding.where["parameter"] for finding in report.findings} <= set(damage.changed)
    for finding in report.findings:
        assert finding.cause in fault.causes
        details = finding.evidence.get("story") or {}
        assert {name: details[name] for name in damage.story} == damage.story


@pytest.mark.parametrize("save", [as_safetensors, as_torch_file, as_dcp, in_memory])
def test_equal_tensors_pass_in_every_format(save: Save, tmp_path: Path) -> None:
    tensors = {
        **reference(),
        "nan": torch.full((3,), float("nan")),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
        "true": torch.tensor([True, False]),
        "half": torch.arange(5).half(),
        "brain": torch.arange(5).bfloat16(),
        "long": torch.tensor([2**60]),
        "row": torch.arange(7.0).reshape(1, 7),
    }
    actual = saved(save, tensors, tmp_path / "actual")
    report = verify_checkpoint(actual, tensors)
    assert report.passed, report.to_text()
    assert report.verdict.coverage.compared == report.verdict.coverage.total == len(tensors)
    tensors["half"][3] = 0
    (finding,) = verify_checkpoint(actual, {**tensors, "half": tensors["half"] + 1}).findings
    assert finding.where["parameter"] == "half"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_intended_cast_passes_and_every_other_bit_does_not(dtype: str) -> None:
    cast = {name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for name, t in reference().items()}
    assert verify_checkpoint(cast, reference(), dtype=dtype).passed
    cast["model.layers.0.self_attn.q_proj.weight"].view(torch.int16)[0, 0] ^= 1
    (finding,) = verify_checkpoint(cast, reference(), dtype=dtype).findings
    assert (finding.cause, finding.where["index"]) == ("bit_flipped", [0, 0])


def test_an_intended_cast_that_was_not_made_is_found() -> None:
    report = verify_checkpoint(reference(), reference(), dtype="bfloat16")
    assert len(report.findings) == len(reference()) - 1  # the integer stays
    assert report.findings[0].evidence["dtype_actual"] == "float32"


def test_only_a_dtype_of_weights_is_a_cast() -> None:
    with pytest.raises(UsageError, match="dtype='int8': expected one of bfloat16"):
        verify_checkpoint(reference(), reference(), dtype=torch.int8)


def test_the_shards_of_one_rank_are_reported_together() -> None:
    shards = {name: tensor.chunk(2)[0] if tensor.dim() else tensor for name, tensor in reference().items()}
    report = verify_checkpoint(shards, reference())
    assert {finding.cause for finding in report.findings} == {"shard_missing"}
    assert (
        f"{len(reference()) - 1} of {len(reference())} tensors: shard_missing: the tensor is TP rank 0's slice"
        in report.to_text()
    )
    assert report.to_text().count("  observed") == 1


def test_a_finding_between_paths_has_the_command_that_repeats_it(tmp_path: Path) -> None:
    sides = [saved(as_safetensors, {"a": torch.tensor([value])}, tmp_path / str(value)) for value in (1.0, 2.0)]
    (finding,) = verify_checkpoint(*sides).findings
    assert finding.again == f"tpcheck checkpoint {sides[0]} {sides[1]}"
    (finding,) = verify_checkpoint(sides[0], {"a": torch.tensor([2.0])}).findings
    assert finding.again is None
