"""The parts of Megatron's optimizers, put together from all ranks, are those of the unsharded run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from tests.runs.assembled import alone, assembled, assert_whole, steps_of
from tpcheck import Rank, UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.registry import modules_of
from tpcheck.numerics.optimizers.choose import view_of
from tpcheck.world.world import World

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="Megatron is not installed")  # 2 s to import

IMPORTED = modules_of("megatron")


@pytest.mark.parametrize(
    ("dtype", "distributed"),
    [(torch.float64, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float64", "float32, distributed", "bfloat16", "bfloat16, distributed"],
)
def test_an_optimizer_of_megatron(world: World, dtype: torch.dtype, distributed: bool) -> None:
    world.run(check_an_optimizer_of_megatron, dtype, distributed)


def check_an_optimizer_of_megatron(tp_rank: Rank, dtype: torch.dtype, distributed: bool) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from tests.backends.megatron_models import gpt, tokens
    from tpcheck.backends.megatron.backend import MegatronBackend, TokenLoss, fill_shards, parameter_layouts
    from tpcheck.backends.megatron.config import configured, transformer_config
    from tpcheck.backends.megatron.session import groups_of_topology, use_groups

    def build() -> nn.Module:
        return TokenLoss(gpt(hidden_dropout=0.0, attention_dropout=0.0))

    def token_batch(dp_rank: int, step: int) -> dict[str, torch.Tensor]:
        ids = tokens({"dp": dp_rank}, step)["input_ids"]
        return {"input_ids": ids, "labels": ids.roll(1)}

    def soft_adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, eps=1e-3)

    clip = 0.5 if distributed else 0.0  # Megatron asserts that a gradient that it clips is float32
    backend = MegatronBackend()
    settings = TrainingOptions(dtype=torch.float64)
    with backend.session(settings):  # where names of types are those of CUDA, as Megatron's optimizers need them
        torch.manual_seed(0)
        reference = build().to(torch.float64)
        groups = groups_of_topology(tp_rank.topology)
        with use_groups(groups), configured(2, {}):
            model = build().to(torch.float64)
            fill_shards(model, reference, parameter_layouts(model, reference, 2), tp_rank)
            model = model.to(dtype)
            ddp_config = DistributedDataParallelConfig(
                use_distributed_optimizer=distributed, grad_reduce_in_fp32=dtype is torch.bfloat16
            )
            ddp = DistributedDataParallel(transformer_config(model, 2), ddp_config, model)
            config = OptimizerConfig(
                lr=0.01, weight_decay=0.0, adam_eps=1e-3, clip_grad=clip, use_distributed_optimizer=distributed,
                bf16=dtype is torch.bfloat16, params_dtype=dtype,
            )  # fmt: skip
            optimizer = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
            view = view_of(ddp, optimizer)
            if dtype is not torch.float64:
                with pytest.raises(UsageError, match="Megatron's optimizer"):
                    view_of(ddp)

            def step(number: int) -> None:
                ddp.zero_grad_buffer()
                optimizer.zero_grad()
                ddp(**token_batch(tp_rank.dp_rank, number)).backward()
                finalize_model_grads([ddp])
                optimizer.step()

            steps = steps_of(view, step)
        plain = soft_adamw(reference.parameters())
        reference_view = view_of(reference, plain, groups=alone())

        def reference_step(number: int) -> None:
            plain.zero_grad()
            for dp_rank in range(2):
                (reference(**token_batch(dp_rank, number)) / 2).backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or 1e9)
            plain.step()

        expected = steps_of(reference_view, reference_step)
    rtol = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]  # losses are of float32
    assert view.weights_follow_the_hook == (dtype is not torch.float64)
    masters = {part.name for part in steps[0] if part.kind == "master"}
    assert bool(masters) == (dtype is torch.bfloat16)
    assert_whole(tp_rank, [[part for part in parts if part.kind != "master"] for parts in steps], expected, rtol=rtol)
    whole = assembled(tp_rank, steps[-1])
    for name in set.union(*tp_rank.gather(masters)):
        assert torch.equal(whole["master", name, ""].to(dtype).double(), whole["weight", name, ""])
