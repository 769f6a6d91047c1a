"""`tpcheck.verify` on callers' models, and its errors about bad arguments."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tpcheck
from tpcheck import Topology, UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.registry import load_backend
from tpcheck.lab.faults.fault import FaultyBackend, Live

COLUMN_THEN_ROW = {
    "tensor_parallel": {
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [
                {"patterns": [".*up\\.weight$"], "partition_type": "column"},
                {"patterns": [".*down\\.weight$"], "partition_type": "row"},
            ],
        }
    }
}


class Regression(nn.Module):
    """Two projections, a norm, and a squared error."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, features_BD: torch.Tensor, targets_BD: torch.Tensor) -> dict[str, torch.Tensor]:
        out_BD = self.norm(self.down(self.dropout(torch.relu(self.up(features_BD)))))
        return {"loss": (out_BD - targets_BD).square().mean(), "out": out_BD}


class Awkward(nn.Module):
    """Frozen and unused parameters, a module called twice, changes in place, checkpoints, a tuple, a counter."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.shared = Residual(), Residual()
        self.relu = nn.ReLU(inplace=True)
        self.reentrant = reentrant
        self.register_buffer("count", torch.zeros(1))

    def forward(self, features_BD: torch.Tensor, targets_BD: torch.Tensor, note: str) -> tuple[None, torch.Tensor]:
        self.count += 1
        hidden_BD = checkpoint(self.block, features_BD.requires_grad_(), use_reentrant=self.reentrant)
        hidden_BD = self.relu(self.shared(self.shared(hidden_BD)))
        return None, (hidden_BD - targets_BD).square().mean()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        out_BD: torch.Tensor = self.down(torch.relu_(self.up(hidden_BD)))
        out_BD += hidden_BD * self.gain
        return out_BD


class Normalised(Regression):
    """With running statistics, which belong to each data-parallel replica's batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)


def whole_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "features_BD": torch.randn(4, 8, generator=generator, dtype=torch.float64),
        "targets_BD": torch.randn(4, 8, generator=generator, dtype=torch.float64),
    }


def batch_of(coordinate: Mapping[str, int], step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + coordinate["dp"])
    return {name: torch.randn(2, 8, generator=generator, dtype=torch.float64) for name in whole_batch()}


class Crashing(Regression):
    def forward(self, features_BD: torch.Tensor, targets_BD: torch.Tensor) -> Any:
        raise ZeroDivisionError("the model is broken")


@pytest.mark.parametrize("batch", [whole_batch(), batch_of], ids=["whole", "callable"])
def test_a_callers_model_is_verified_over_tp_and_dp(batch: Any) -> None:
    report = verify(lambda: Regression(dropout=0.5), batch, topology=Topology(tp=2, dp=2))
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total


class Random(Regression):
    """Draws a dropout mask that no attribute disables."""

    def forward(self, features_BD: torch.Tensor, targets_BD: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(nn.functional.dropout(features_BD, 0.1), targets_BD)


class Counting(Regression):
    """A buffer that each batch changes and the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8), persistent=False)

    def forward(self, features_BD: torch.Tensor, targets_BD: torch.Tensor) -> dict[str, torch.Tensor]:
        self.scale = self.scale * 0.9 + features_BD.mean(dim=0) * 0.1
        return super().forward(features_BD * self.scale, targets_BD)


class NormsAlone(Regression):
    """Only replicated parameters are trained: DeepSpeed's ranks above 0 then reduce a norm of another shape."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in (*self.up.parameters(), *self.down.parameters()):
            parameter.requires_grad_(False)


def test_an_error_about_the_model_is_raised_as_bad_usage() -> None:
    with pytest.raises(UsageError, match="computes the same each time"):
        verify(Random, whole_batch())


def test_a_buffer_that_batches_change_belongs_to_each_replica() -> None:
    report = verify(Counting, whole_batch(), topology=Topology(tp=2, dp=2))
    assert report.passed, report
    (check,) = (check for check in report.verdict.checks if check.check == "updates_match_reference")
    assert check.compared == 2 * 2 * (6 + 1)  # steps, replicas, parameters and the buffer


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_training_replicated_parameters_alone_passes(zero_stage: int) -> None:
    report = verify(NormsAlone, whole_batch(), zero_stage=zero_stage)
    assert report.passed, report


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_awkward_models_pass(reentrant: bool, zero_stage: int) -> None:
    batch = {**whole_batch(), "note": "not a tensor"}
    report = verify(lambda: Awkward(reentrant), batch, topology=Topology(tp=2, dp=2), zero_stage=zero_stage)
    assert report.passed, report
    assert set(report.verdict.coverage.not_compared.values()) <= {
        "it has no gradient, and optimizers differ in whether they decay it",
        "not seen on every rank of the sharded model",  # ZeRO 3 hides the inputs of a reentrant checkpoint
    }


def test_running_statistics_of_data_parallel_replicas_may_differ() -> None:
    assert verify(Normalised, whole_batch(), topology=Topology(tp=2, dp=2)).passed


def test_the_reference_clips_to_the_configured_norm() -> None:
    assert verify(Regression, whole_batch(), config={"gradient_clipping": 0.01}).passed


def test_a_report_names_the_model_and_its_versions() -> None:
    report = verify(Regression, whole_batch())
    assert report.verdict.subject["model"] == "Regression"
    assert {"torch", "deepspeed", "tpcheck"} <= set(report.verdict.environment)


def test_a_bug_of_the_model_itself_is_an_error_with_its_traceback() -> None:
    report = verify(Crashing, whole_batch())
    assert report.verdict.verdict == "error"
    assert "the model is broken" in (report.verdict.message or "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "megatronn"}, "backend='megatronn': expected one of"),
        ({"dtype": "float8"}, "dtype='float8': expected one of float64, float32, bfloat16, float16"),
        ({"zero_stage": 4}, "zero_stage=4: expected one of 0, 1, 2, 3"),
        ({"steps": 0}, "steps=0: expected an integer from 1"),
        ({"replays": 0}, "replays=0: expected an integer from 1"),
        ({"seed": "a"}, "seed='a': expected an integer from 0"),
        ({"topology": 2}, "topology=2: expected a tpcheck.Topology"),
        ({"backend": None}, "backend=None: expected one of"),
        ({"batch": [1]}, "batch='list': expected a dict of tensors"),
        ({"checks": "outputs_match_reference"}, "expected a list of names"),
        ({"checks": ["outputs"]}, "checks=\\['outputs'\\]: expected one of all, groups_match_topology"),
        ({"build": Regression()}, "expected a callable"),
        ({"config": {"zero_optimization": {"stage": 3}}}, "config.zero_optimization.stage=3: expected 0"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_accepted(options: dict[str, Any], message: str) -> None:
    build, batch = options.pop("build", Regression), options.pop("batch", whole_batch())
    with pytest.raises(UsageError, match=message):
        verify(build, batch, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "config.gradient_accumulation_steps=0: expected a positive integer"),
        ({"bf16": {"enabled": True}}, "config.bf16.enabled=True: expected False, as dtype=torch.float64"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer='Lamb': expected one of"),
    ],
)
def test_a_configuration_that_contradicts_the_options_is_bad_usage(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_backend("deepspeed").resolved(TrainingOptions(dtype=torch.float64, config=config))


def test_the_configured_norm_is_the_references_too() -> None:
    options = TrainingOptions(dtype=torch.float64, config={"gradient_clipping": 0.0})
    assert load_backend("deepspeed").resolved(options).max_grad_norm == 0.0


def change_a_buffer_after_each_step(live: Live) -> None:
    step = live.candidate.engine.step

    def changing() -> None:
        step()
        live.module("model.rotary_emb").original_inv_freq.mul_(1 + 1e-9)

    live.candidate.engine.step = changing


def test_a_buffer_that_changes_on_every_rank_is_found() -> None:
    backend = FaultyBackend(change_a_buffer_after_each_step)
    first, *_ = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=backend, steps=1, replays=2).findings
    assert (first.check, first.where["module"]) == ("updates_match_reference", "model.rotary_emb")
    assert first.margin > 1e3


def verify(build: Any, batch: Any, **options: Any) -> tpcheck.Report:
    arguments = {"topology": Topology(tp=2), "config": COLUMN_THEN_ROW, "timeout": 60, **options}
    arguments["config"] = {**COLUMN_THEN_ROW, **arguments["config"]}
    return tpcheck.verify(build, batch, **arguments)
