"""Lightning's Trainer with the callback, tensor parallelism by its own strategy."""

from __future__ import annotations

import os
from typing import Any

import pytest

import tpcheck
from tpcheck import Rank, Topology
from tpcheck.lab.faults.pipelines import augmented

pytest.importorskip("lightning.pytorch")


def train(rank: Rank, *, seeded: bool, workers: int = 0) -> tuple[Any, int, str]:
    """Train on images whose brightness is drawn on each rank; return the finding, the number of steps, the groups."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

    from tpcheck.trainer.lightning import LightningCallback

    class Brightness(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def configure_model(self) -> None:
            """Shard nothing: the test is about the data."""

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return (batch["pixel_values"].mean() * self.scale).square()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    os.environ |= {"LOCAL_RANK": str(rank.rank), "TORCHELASTIC_RUN_ID": "test"}
    sizes = {"data_parallel_size": rank.topology.dp, "tensor_parallel_size": rank.topology.tp}
    callback = LightningCallback(timeout=20)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=rank.topology.world_size,
        strategy=ModelParallelStrategy(**sizes),
        plugins=[TorchElasticEnvironment()],
        use_distributed_sampler=False,
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(Brightness(), augmented(rank, "python", seeded=seeded, workers=workers))
    except tpcheck.BatchMismatch as mismatch:
        return mismatch.report.findings[0], trainer.global_step, mismatch.report.verdict.subject["groups_from"]
    return None, trainer.global_step, ""


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(tp=2, dp=2)], ids=str)
@pytest.mark.parametrize(("workers", "where"), [(0, "the main process"), (1, "workers")])
def test_the_first_wrong_step_is_found_with_its_cause(topology: Topology, workers: int, where: str) -> None:
    with tpcheck.spawn(topology, timeout=120) as world:
        finding, steps, source = world.run(train, seeded=False, workers=workers)[0]
    assert (finding.where["field"], finding.where["step"]) == ("pixel_values", steps)
    assert (finding.cause, finding.evidence["where"]) == ("rng_differs_python", where)
    assert source == "the device mesh on the model"


def test_seeded_batches_are_equal() -> None:
    with tpcheck.spawn(Topology(tp=2), timeout=120) as world:
        assert {finding for finding, *_ in world.run(train, seeded=True)} == {None}


def test_hooks_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCHECK", "0")
    with tpcheck.spawn(Topology(tp=2), timeout=120) as world:
        assert {finding for finding, *_ in world.run(train, seeded=False)} == {None}
