"""The DeepSpeed configuration of a run, and layouts as DeepSpeed's layers gather them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tpcheck import Rank, Topology, UsageError, spawn
from tpcheck.backends.interface import TrainingOptions

pytest.importorskip("deepspeed")


def options(dtype: torch.dtype = torch.float64, **changes: Any) -> TrainingOptions:
    return TrainingOptions(dtype=dtype, **changes)


def config_of(tp: int = 2, **changes: Any) -> dict[str, Any]:
    from tpcheck.backends.deepspeed.config import deepspeed_config

    return deepspeed_config(options(**changes), tp)


def test_the_topology_and_the_options_set_the_configuration() -> None:
    config = config_of(tp=4, zero_stage=1, batch_size=3, max_grad_norm=0.5)
    assert config["tensor_parallel"] == {"autotp_size": 4}
    assert config["zero_optimization"] == {"stage": 1}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_clipping"]) == (3, 0.5)


def test_zero_3_partitions_small_parameters_too() -> None:
    assert config_of(zero_stage=3)["zero_optimization"] == {"stage": 3, "stage3_param_persistence_threshold": 0}


@pytest.mark.parametrize(("dtype", "section"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_low_precision_enables_its_section(dtype: torch.dtype, section: str) -> None:
    assert config_of(dtype=dtype)[section] == {"enabled": True}
    assert section not in config_of()


def test_the_users_configuration_is_merged_key_by_key() -> None:
    config = config_of(zero_stage=1, config={"zero_optimization": {"overlap_comm": True}, "seed": 1})
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert config["seed"] == 1


def test_a_value_replaces_a_section_and_a_section_a_value() -> None:
    from tpcheck.backends.deepspeed.config import merged

    assert merged({"a": {"b": 1}, "c": 2}, {"a": 3, "c": {"d": 4}}) == {"a": 3, "c": {"d": 4}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"zero_stage": 1, "config": {"zero_optimization": {"stage": 2}}},
            "config.zero_optimization.stage=2: expected 1",
        ),
        ({"config": {"tensor_parallel": {"autotp_size": 4}}}, "config.tensor_parallel.autotp_size=4: expected 2"),
    ],
)
def test_a_configuration_that_contradicts_the_options_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config_of(**changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "Lamb"}}, "optimizer='Lamb': expected one of"),
        ({"scheduler": {"type": "Cosinus"}}, "config.scheduler.type='Cosinus'"),
        ({"gradient_accumulation_steps": 0}, "config.gradient_accumulation_steps=0"),
        ({"bf16": {"enabled": True}}, "config.bf16.enabled=True: expected False, as dtype=torch.float64 requires"),
    ],
)
def test_training_that_the_reference_cannot_do_is_refused(config: dict[str, Any], message: str) -> None:
    from tpcheck.backends.deepspeed.config import resolved

    with pytest.raises(UsageError, match=message):
        resolved(options(config=config))


MUON = {"optimizer": {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.9, "betas": [0.8, 0.9]}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 2}, "expected 0 or 3 with DeepSpeed's Muon"),
        ({"zero_stage": 3}, "expected 0 with DeepSpeed's Muon at ZeRO 3"),
        ({"loop": "trainer"}, "expected plain with DeepSpeed's Muon"),
        ({"optimizer": "adamw"}, "expected none beside config.optimizer, which is Muon"),
    ],
)
def test_deepspeeds_muon_is_refused_where_it_clips_or_groups_otherwise(changes: dict[str, Any], message: str) -> None:
    from tpcheck.backends.deepspeed.config import resolved

    with pytest.raises(UsageError, match=message):
        resolved(options(config=MUON, **changes))


def test_deepspeeds_muon_takes_the_matrices_but_the_embedding_and_the_head() -> None:
    from tpcheck.backends.deepspeed.config import resolved
    from tpcheck.backends.optimizer import make_optimizer

    names = ["embed_tokens.weight", "layers.0.up.weight", "norm.weight", "lm_head.weight"]
    parameters = [torch.zeros(shape, dtype=torch.float64) for shape in ((4, 4), (4, 4), (4,), (4, 4))]
    made = make_optimizer(resolved(options(config=MUON)), parameters, names=names)
    by_kind = {group["use_muon"]: group for group in made.param_groups}
    assert [id(each) for each in by_kind[True]["params"]] == [id(parameters[1])]
    assert {id(each) for each in by_kind[False]["params"]} == {id(parameters[at]) for at in (0, 2, 3)}
    assert (by_kind[True]["momentum"], by_kind[False]["betas"]) == (0.9, [0.8, 0.9])


@pytest.mark.parametrize("optimizer", ["muon", torch.optim.SGD])
def test_an_optimizer_that_the_trainer_drops_is_refused(optimizer: Any) -> None:
    from tpcheck.backends.deepspeed.config import resolved

    with pytest.raises(UsageError, match="with DeepSpeed the Trainer drops what it is given as `optimizers`"):
        resolved(options(optimizer=optimizer, loop="trainer"))
    assert resolved(options(optimizer=optimizer)).optimizer is optimizer


def test_the_configuration_says_how_both_sides_train() -> None:
    from tpcheck.backends.deepspeed.config import deepspeed_config, resolved

    config = {
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "betas": [0.8, 0.9], "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2}},
        "gradient_accumulation_steps": 3,
        "gradient_clipping": "auto",
    }
    both = resolved(options(config=config))
    assert both.accumulate == 3
    assert both.max_grad_norm == options().max_grad_norm
    # DeepSpeed's Adam is AdamW, and decays no weights unless it is told to
    assert both.optimizer == {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.8, 0.9], "weight_decay": 0.0}}
    assert both.schedule is not None
    made = deepspeed_config(both, 2)
    assert made["optimizer"]["params"]["torch_adam"] is True
    assert made["optimizer"]["params"]["weight_decay"] == 0.0
    assert made["gradient_accumulation_steps"] == 3


def test_accumulation_and_an_optimizer_are_given_once() -> None:
    from tpcheck.backends.deepspeed.config import resolved

    with pytest.raises(UsageError, match="gradient_accumulation_steps=3: expected 2, as accumulate"):
        resolved(options(accumulate=2, config={"gradient_accumulation_steps": 3}))
    with pytest.raises(UsageError, match=r"expected none beside config.optimizer"):
        resolved(options(optimizer="rmsprop", config={"optimizer": {"type": "Adam"}}))
    made = resolved(options(optimizer="adamw", config={"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}))
    assert made.optimizer == {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.0}}


def test_both_sides_clip_to_the_norm_of_the_users_configuration() -> None:
    from tpcheck.backends.deepspeed.config import resolved

    assert resolved(options(config={"gradient_clipping": 0.25})).max_grad_norm == 0.25
    assert resolved(options(max_grad_norm=2.0)).max_grad_norm == 2.0


def test_a_plan_is_hidden_inside_the_context_only() -> None:
    from tpcheck.backends.deepspeed.backend import without_plan

    class Planned(nn.Module):
        _tp_plan = {"layers.*": "colwise"}  # noqa: RUF012

    model = Planned()
    model.config = SimpleNamespace(base_model_tp_plan={"layers.*": "rowwise"})
    with without_plan(model):
        assert (model._tp_plan, model.config.base_model_tp_plan) == (None, None)
    assert model._tp_plan == Planned._tp_plan
    assert model.config.base_model_tp_plan == {"layers.*": "rowwise"}


class GatheringLayer(nn.Module):
    """A layer that DeepSpeed might have made: it gathers its shards by `order`, or cannot gather them."""

    def __init__(self, rank: Rank, columns: int, order: list[int] | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, columns), float(rank.rank)))
        self.bias = None
        self.mp_group = rank.group("tp")
        self.order = order

    def gather_params(self, parameters: list[torch.Tensor]) -> None:
        import torch.distributed as dist

        if self.order is None:
            raise RuntimeError("shapes do not fit")
        shards: list[Any] = [None, None]
        dist.all_gather_object(shards, parameters[0].data, group=self.mp_group)
        parameters[0].data = torch.cat(shards, dim=1)[:, self.order]


def gathered_layouts(rank: Rank) -> dict[str, Any]:
    from tpcheck.backends.deepspeed.candidate import parameter_layouts

    columns = 1 + rank.rank  # uneven: one column on the first rank, two on the second
    model = nn.Module()
    model.cut = GatheringLayer(rank, columns, [1, 0, 2])
    model.fused = GatheringLayer(rank, columns, None)
    model.norm = nn.LayerNorm(3)
    found = parameter_layouts(model, rank.group("tp"))
    assert torch.equal(model.cut.weight, torch.full((2, columns), float(rank.rank)))  # its data is restored
    return found


def test_layouts_are_what_the_layers_gather() -> None:
    with spawn(Topology(tp=2), timeout=120) as world:
        found = world.run(gathered_layouts)[0]
    assert found["cut.weight"].local_shapes == ((2, 1), (2, 2))
    full = found["cut.weight"].assemble([torch.tensor([[0], [10]]), torch.tensor([[1, 2], [11, 12]])])
    assert full.tolist() == [[1, 0, 2], [11, 10, 12]]
    assert "fused.weight" not in found
    assert found["norm.weight"].is_replicated


def test_auto_is_what_the_trainer_makes_of_it() -> None:
    from tpcheck.backends.deepspeed.config import deepspeed_config, resolved

    config = {
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"},
        "monitor_of_mine": "auto",
    }
    made = resolved(options(accumulate=4, config=config, zero_stage=3))
    assert (made.accumulate, made.max_grad_norm) == (4, 1.0)
    assert made.optimizer == {"type": "AdamW", "params": {"lr": 5e-5, "betas": [0.9, 0.999], "weight_decay": 0.0}}
    whole = deepspeed_config(made, 2, hidden_size=64)
    assert "monitor_of_mine" not in whole
    assert whole["bf16"] == {"enabled": False}
    assert whole["scheduler"]["params"] == {"warmup_max_lr": 5e-5, "warmup_num_steps": 1}
    assert whole["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 4096,
        "stage3_param_persistence_threshold": 640,
    }


@pytest.mark.parametrize(
    ("section", "zero_stage", "scales"),
    [
        ({}, 1, [65536.0, 65536.0, 32768.0]),  # the second overflow halves it
        ({}, 0, [65536.0, 32768.0, 16384.0]),  # each does, without ZeRO
        ({"initial_scale_power": 4, "hysteresis": 1, "min_loss_scale": 8}, 2, [16.0, 8.0, 8.0]),
        ({"loss_scale": 128}, 1, [128.0, 128.0, 128.0]),
    ],
)
def test_losses_in_float16_are_scaled_as_the_configuration_says(
    section: dict[str, Any], zero_stage: int, scales: list[float]
) -> None:
    from tpcheck.backends.deepspeed.config import resolved

    given = options(dtype=torch.float16, zero_stage=zero_stage, config={"fp16": section} if section else {})
    make = resolved(given).loss_scale
    assert make is not None
    scale, found = make(), []
    for _ in scales:
        found.append(scale.scale)
        scale.update(overflows=True)
    assert found == scales
    assert resolved(options()).loss_scale is None


def test_float16_in_the_configuration_alone_is_refused() -> None:
    from tpcheck.backends.deepspeed.config import resolved

    with pytest.raises(UsageError, match=r"config.fp16.enabled=True: expected False, as dtype=torch.float64 requires"):
        resolved(options(config={"fp16": {"enabled": True}}))
