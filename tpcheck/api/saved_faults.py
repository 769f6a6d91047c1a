"""Plants the faults of checkpoints in copies of small models, and compares what is found with what is true."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcheck.records import Finding
from tpcheck.records.caught import CONTROL, Caught

if TYPE_CHECKING:
    from torch import Tensor

    from tpcheck.faults import CheckpointFault
    from tpcheck.faults.damage import Damage
    from tpcheck.report import Report


def run_checkpoint_fault(fault: CheckpointFault, *, seed: int = 0) -> Caught:
    """Damage one tensor of a saved model, drawn by the seed, and verify the checkpoint."""
    start = time.monotonic()
    tensors = drawn_tensors(fault.family, fault.settings, 2 * seed)
    earlier = drawn_tensors(fault.family, fault.settings, 2 * seed + 1)
    damage = fault.drawn(tensors, earlier, seed)
    report = _verified(damage.of(tensors), tensors, earlier)
    found = report.findings
    first = found[0] if found else None
    return Caught(
        fault=fault.name,
        kind=fault.kind,
        what=fault.what,
        verdict=report.verdict.verdict,
        checks=tuple(dict.fromkeys(finding.check for finding in found)),
        place=None if first is None else str(first.where.get("parameter")),
        true_places=tuple(damage.changed),
        place_is_right=bool(found) and all(finding.where.get("parameter") in damage.changed for finding in found),
        cause=None if first is None else first.cause,
        true_causes=fault.causes,
        cause_is_right=bool(found) and all(_is_told(finding, fault, damage) for finding in found),
        margin=0.0 if first is None else first.margin,
        dtype="any",
        seed=seed,
        seconds=time.monotonic() - start,
        link=fault.link,
        message=report.verdict.message,
    )


def run_saved_control(family: str, settings: Mapping[str, Any], *, seed: int = 0) -> Caught:
    """Verify a checkpoint that nothing has happened to."""
    start = time.monotonic()
    tensors = drawn_tensors(family, settings, 2 * seed)
    report = _verified(tensors, tensors, drawn_tensors(family, settings, 2 * seed + 1))
    return Caught(
        fault=" ".join([f"saved {family}", *(f"{key}={value}" for key, value in settings.items())]),
        kind=CONTROL,
        what="nothing has happened to the checkpoint",
        verdict=report.verdict.verdict,
        dtype="any",
        seed=seed,
        seconds=time.monotonic() - start,
        message=report.verdict.message,
    )


def drawn_tensors(family: str, settings: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Return tensors of the names, shapes and ties of a small model; constants, which look alike, are drawn, too."""
    import torch

    from tpcheck.families.build import small_model

    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in small_model(family, settings).state_dict().items():
        if tensor.data_ptr() not in drawn:
            drawn[tensor.data_ptr()] = torch.randn(tensor.shape, generator=generator)
        tensors[name] = drawn[tensor.data_ptr()]
    return tensors


def _verified(actual: Mapping[str, Tensor], reference: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> Report:
    from tpcheck.api.checkpoint import verify_checkpoint

    with tempfile.TemporaryDirectory(prefix="tpcheck-faults-") as folder:
        saved, before = Path(folder, "saved.safetensors"), Path(folder, "before.safetensors")
        _save(actual, saved)
        _save(earlier, before)
        return verify_checkpoint(saved, dict(reference), earlier=[before])


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, as transformers does: tied tensors once."""
    from safetensors.torch import save_file

    once: dict[int, str] = {}
    for name, tensor in tensors.items():
        once.setdefault(tensor.data_ptr(), name)
    save_file({name: tensors[name].contiguous() for name in once.values()}, path)


def _is_told(finding: Finding, fault: CheckpointFault, damage: Damage) -> bool:
    """Return whether the cause is right, and so are the rank, dim and indices that come with it."""
    story = finding.evidence.get("story") or {}
    told = all(story.get(key) == value for key, value in damage.story.items())
    return finding.cause in fault.causes and told
