"""Whatever happened to a tensor is found, placed and named, in every format that holds plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from tests.checkpoints.faults import FAULTS, Tensors, drawn, earlier, is_tied, reference
from tpcheck import verify_checkpoint
from tpcheck.lab.faults.checkpoint import CheckpointFault
from tpcheck.numerics.exact.explain import _TESTS as OF_TENSORS
from tpcheck.numerics.exact.slice_matching import _TESTS as OF_LAYOUTS


def as_safetensors(tensors: Tensors, folder: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def as_torch_file(tensors: Tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def as_dcp(tensors: Tensors, folder: Path) -> Path:
    dcp.save(dict(tensors), checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def as_live(tensors: Tensors, folder: Path) -> Tensors:
    return tensors


FORMATS = (as_safetensors, as_torch_file, as_dcp, as_live)


def written(save: Callable[[Tensors, Path], object], tensors: Tensors, folder: Path, name: str) -> object:
    (folder / name).mkdir()
    return save(tensors, folder / name)


@pytest.mark.parametrize("save", FORMATS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_placed_and_named(save: Callable[..., object], fault: CheckpointFault, tmp_path: Path) -> None:
    assert_found(fault, save, tmp_path, seed=0)


@pytest.mark.parametrize("seed", range(1, 6))
def test_every_draw_of_a_fault_is_found_placed_and_named(seed: int, tmp_path: Path) -> None:
    for fault in FAULTS:
        folder = tmp_path / fault.name
        folder.mkdir()
        assert_found(fault, as_safetensors, folder, seed)


def assert_found(fault: CheckpointFault, save: Callable[..., object], folder: Path, seed: int) -> None:
    damage, tied = drawn(fault, seed), is_tied(fault)
    actual = written(save, damage.of(reference(tied)), folder, "actual")
    before = written(save, earlier(tied), folder, "earlier")
    report = verify_checkpoint(actual, reference(tied), earlier=[before])
    assert report.verdict.verdict == "failed"
    assert {finding.where["parameter"] for finding in report.findings} <= set(damage.changed)
    for finding in report.findings:
        assert finding.cause in fault.causes
        story = finding.evidence.get("story") or {}
        assert {name: story[name] for name in damage.story} == damage.story


@pytest.mark.parametrize("save", FORMATS)
def test_the_same_tensors_pass(save: Callable[..., object], tmp_path: Path) -> None:
    odd = {
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
    report = verify_checkpoint(written(save, odd, tmp_path, "actual"), odd)
    assert report.passed, report.to_text()
    assert report.verdict.coverage.compared == report.verdict.coverage.total == len(odd)


def test_zero_is_not_minus_zero_and_nan_is_not_another_nan() -> None:
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert not verify_checkpoint({"a": torch.tensor([-0.0, 1.0])}, {"a": torch.tensor([0.0, 1.0])}).passed
    assert not verify_checkpoint({"a": other_nan}, {"a": torch.tensor([float("nan")])}).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_that_was_meant_passes_and_every_other_bit_does_not(dtype: str) -> None:
    cast = {name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for name, t in reference().items()}
    assert verify_checkpoint(cast, reference(), dtype=dtype).passed
    cast["model.layers.0.self_attn.q_proj.weight"].view(torch.int16)[0, 0] ^= 1
    (finding,) = verify_checkpoint(cast, reference(), dtype=dtype).findings
    assert (finding.cause, finding.where["index"]) == ("bit_flipped", [0, 0])


def test_a_cast_that_was_meant_and_not_made_is_found() -> None:
    report = verify_checkpoint(reference(), reference(), dtype="bfloat16")
    assert len(report.findings) == len(reference()) - 1  # the integer stays
    assert report.findings[0].evidence["dtype_actual"] == "float32"


def test_all_tensors_of_one_rank_are_one_story() -> None:
    shards = {name: tensor.chunk(2)[0] if tensor.dim() else tensor for name, tensor in reference().items()}
    report = verify_checkpoint(shards, reference())
    assert {finding.cause for finding in report.findings} == {"shard_missing"}
    assert "9 of 10 tensors: shard_missing: the tensor is TP rank 0's slice" in report.to_text()
    assert report.to_text().count("  observed") == 1


@pytest.mark.parametrize("test", [*OF_TENSORS, *OF_LAYOUTS], ids=lambda test: test.__name__)
def test_every_test_of_a_cause_is_needed(test: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpcheck.numerics.exact import explain, layouts

    monkeypatch.setattr(explain, "_TESTS", tuple(one for one in OF_TENSORS if one is not test))
    monkeypatch.setattr(layouts, "_TESTS", tuple(one for one in OF_LAYOUTS if one is not test))
    named = [
        verify_checkpoint(drawn(fault, 0).of(reference()), reference(), earlier=[earlier()]).findings[0].cause
        for fault in FAULTS
        if not is_tied(fault)
    ]
    assert named != [cause for fault in FAULTS if not is_tied(fault) for cause in fault.causes]
