"""The parts of DeepSpeed's optimizers, put together from all ranks, are those of the unsharded run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from tests.runs.assembled import adamw, assembled, assert_whole, batch, built, expected_steps, steps_of
from tpcheck import Rank, UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.numerics.optimizers.choose import view_of
from tpcheck.world.forkserver_client import ZERO_PRELOAD
from tpcheck.world.world import World

pytest.importorskip("deepspeed")

IMPORTED = ZERO_PRELOAD


def deepspeed_engine(rank: Rank, model: nn.Module, make: Callable[[Any], Any], config: dict[str, Any]) -> Any:
    import deepspeed

    from tpcheck.backends.deepspeed.config import merged

    defaults = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "tensor_parallel": {"autotp_size": rank.topology.tp, "partition_config": PARTITION},
        "steps_per_print": 1_000_000,
    }
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=merged(defaults, config))[0]


PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.up\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.down\.weight$"], "partition_type": "row"},
        {"patterns": [r".*(norm|head|embed)\.weight$"], "partition_type": "skip"},
    ],
}


def zero(stage: int, **changes: Any) -> dict[str, Any]:
    persistence = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **persistence, **changes}}


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() == 1]
    groups = [{"params": matrices, "lr": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def train_engine(engine: Any, dp_rank: int, step: int) -> None:
    engine.backward(engine(batch(dp_rank, step)))
    engine.step()


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (zero(0), adamw),
        (zero(1), two_groups),
        (zero(1, round_robin_gradients=True), adamw),
        (zero(2), two_groups),
        (zero(3), two_groups),
        (zero(3, sub_group_size=200), adamw),
    ],
    ids=["0", "1, two groups", "1, round robin", "2, two groups", "3, two groups", "3, sub-groups"],
)
def test_a_deepspeed_engine(world: World, config: dict[str, Any], make: Callable[[Any], Any]) -> None:
    world.run(check_a_deepspeed_engine, config, make)


def check_a_deepspeed_engine(tp_rank: Rank, config: dict[str, Any], make: Callable[[Any], Any]) -> None:
    from tpcheck.backends.deepspeed import DeepSpeedBackend
    from tpcheck.numerics.precision import everything_in_float64

    clip = 0.5
    expected = expected_steps(tp_rank, built(), lambda parameters: make(list(parameters)), clip=clip)
    model = built()
    with DeepSpeedBackend().session(TrainingOptions(dtype=torch.float64)), everything_in_float64():
        engine = deepspeed_engine(tp_rank, model, make, {**config, "gradient_clipping": clip})
        view = view_of(engine)
        steps = steps_of(view, lambda step: train_engine(engine, tp_rank.dp_rank, step))
    assert_whole(tp_rank, steps, expected)
    names = [group.parameters for group in view.groups()]
    assert sorted(name for group in names for name in group) == sorted({part.name for part in expected[0]})
    assert view.num_skipped() == 0
    assert not view.not_viewed()


ACCUMULATE = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
BF16 = {**ACCUMULATE, "bf16": {"enabled": True}}
FP16 = {**ACCUMULATE, "fp16": {"enabled": True, "loss_scale": 128.0}}
FLOAT32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
FUSED = "fused"


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ({**BF16, **zero(0)}, ""),
        ({**BF16, **zero(1), **FLOAT32_ACCUMULATION}, ""),
        ({**BF16, **zero(2)}, ""),
        ({**BF16, **zero(3)}, ""),
        ({**FP16, **zero(0)}, ""),
        ({**FP16, **zero(0)}, FUSED),
        ({**FP16, **zero(2)}, ""),
    ],
    ids=["bf16 0", "bf16 1, float32 accumulation", "bf16 2", "bf16 3", "fp16 0", "fp16 0, fused", "fp16 2"],
)
def test_a_deepspeed_engine_with_masters(world: World, config: dict[str, Any], how: str) -> None:
    """AdamW of the gradients, from the states before the step, gives the masters after it; these give the weights."""
    world.run(check_a_deepspeed_engine_with_masters, config, how)


def check_a_deepspeed_engine_with_masters(tp_rank: Rank, config: dict[str, Any], how: str) -> None:
    dtype = torch.bfloat16 if "bf16" in config else torch.float16
    clip = config["gradient_clipping"]
    with low_precision_allowed(how):
        engine = deepspeed_engine(tp_rank, built().to(dtype), adamw, config)
        view = view_of(engine)
        assert view.weights_follow_the_hook
        before = assembled(tp_rank, list(view.states()))
        for step in range(2):
            (parts,) = steps_of(view, lambda step: train_accumulated(engine, tp_rank.dp_rank, step), 1)
            after = assembled(tp_rank, parts)
            assert_step_of_adamw(before, after, dtype)
            before = after
        gradients = {name: tensor for (kind, name, _), tensor in after.items() if kind == "gradient"}
        norm = torch.stack([tensor.norm() for tensor in gradients.values()]).norm()
        reported = view.reported_norm()
        assert reported is not None
        if reported > clip * view.loss_scale():
            assert float(norm) == pytest.approx(clip, rel=0.3)  # clipped by the norm of one TP rank at ZeRO 0
    assert view.loss_scale() == (128.0 if "fp16" in config else 1.0)


def train_accumulated(engine: Any, dp_rank: int, step: int) -> None:
    for micro_batch in range(2):
        train_engine(engine, dp_rank, 2 * step + micro_batch)


def assert_step_of_adamw(before: dict[Any, torch.Tensor], after: dict[Any, torch.Tensor], dtype: torch.dtype) -> None:
    names = [name for kind, name, _ in after if kind == "weight"]
    assert len(names) == len(set(names)) == 14
    for name in names:
        master, gradient = after["master", name, ""], after["gradient", name, ""]
        start = before["master", name, ""]
        state = {key: before.get(("state", name, key), torch.zeros(())) for key in ("step", "exp_avg", "exp_avg_sq")}
        count = float(state["step"]) + 1
        average = 0.9 * state["exp_avg"] + 0.1 * gradient
        square = 0.999 * state["exp_avg_sq"] + 0.001 * gradient**2
        update = (average / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        expected = start * (1 - 0.01 * 0.1) - 0.01 * update
        assert float(after["state", name, "step"]) == count
        torch.testing.assert_close(after["state", name, "exp_avg"], average, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(master, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(after["weight", name, ""], master.to(dtype).double())


@contextmanager
def low_precision_allowed(how: str) -> Iterator[None]:
    """Let DeepSpeed train in float16 on any CPU; take AdamW for its FusedAdam, which has to be compiled."""
    import deepspeed
    from deepspeed.runtime import engine

    with ExitStack() as stack:
        stack.enter_context(patch.object(deepspeed.get_accelerator(), "is_fp16_supported", lambda: True))
        if how == FUSED:
            stack.enter_context(patch.object(engine, "FusedAdam", torch.optim.AdamW))
        yield


@pytest.mark.tpcheck(tp=2)
def test_a_step_that_deepspeed_skips_is_counted(tp_rank: Rank) -> None:
    config = {**zero(1), "fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}}
    with low_precision_allowed(""):
        engine = deepspeed_engine(tp_rank, built().half(), adamw, config)
        view = view_of(engine)
        (parts,) = steps_of(view, lambda step: train_engine(engine, 0, step), 1)
    assert view.num_skipped() == 1
    assert {part.kind for part in parts} == {"weight", "master"}


@pytest.mark.tpcheck(tp=1, dp=2)
def test_the_module_of_an_engine_needs_its_optimizer(tp_rank: Rank) -> None:
    engine = deepspeed_engine(tp_rank, built().float(), adamw, zero(1))
    with pytest.raises(UsageError, match="the DeepSpeed engine"):
        view_of(engine.module)
    view = view_of(engine.module, engine.optimizer)
    assert view.stepping == (engine.optimizer.optimizer,)
    assert len(list(view.weights())) == 14
