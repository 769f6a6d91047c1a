"""Megatron's distributed optimizer as a candidate's: each DP rank reduces, steps and gathers its part of a bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from tpcheck.backends.interface import TrainingOptions, WayToResume
from tpcheck.backends.layout import Layout
from tpcheck.backends.megatron.candidate import MegatronCandidate
from tpcheck.backends.megatron.session import Groups, use_groups
from tpcheck.backends.optimizer import named_optimizer
from tpcheck.backends.sgd import LOW_PRECISION


def distributed_optimizer(ddp: Any, options: TrainingOptions) -> Any:
    """Return Megatron's optimizer of a model whose gradients are sharded over DP. Runs under the topology's groups."""
    named = named_optimizer(options)
    assert named is not None  # `require_supported` has checked it
    params = {"betas": (0.9, 0.999), "eps": 1e-8, **named[1]}
    config = OptimizerConfig(
        lr=params["lr"],
        weight_decay=params["weight_decay"],
        adam_beta1=params["betas"][0],
        adam_beta2=params["betas"][1],
        adam_eps=params["eps"],
        clip_grad=options.max_grad_norm,
        use_distributed_optimizer=True,
        bf16=options.dtype is torch.bfloat16,
        params_dtype=options.dtype,
    )
    optimizer = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
    # As in a training script: it is the schedule that turns `wd_mult` of a group into its decay, when it is made.
    decay, rate = config.weight_decay, config.lr
    OptimizerParamScheduler(
        optimizer, rate, rate, 0.0, 0, options.steps, "constant", decay, decay, options.steps, "constant"
    )
    return optimizer


class DistributedOptimizerCandidate(MegatronCandidate):
    """A model whose gradients and moments each DP rank holds a part of.

    Args:
        distributed: Of `distributed_optimizer`.
    """

    def __init__(
        self,
        ddp: Any,
        groups: Groups,
        layouts: Mapping[str, Layout],
        distributed: Any,
        accumulate: int = 1,
        *,
        per_token: bool = False,
    ) -> None:
        super().__init__(ddp, groups, layouts, None, accumulate, per_token=per_token)
        self.optimizer = distributed  # an injected fault may change it
        chained = getattr(distributed, "chained_optimizers", (distributed,))
        self.optimizers = tuple(each for each in chained if not each.is_stub_optimizer)

    def gradient(self, name: str) -> torch.Tensor | None:
        parameter: Any = self._parameters[name]
        if not hasattr(parameter, "main_grad"):
            return None
        gradient: torch.Tensor = parameter.main_grad  # only this rank's part is reduced

        def part(start: int, end: int, stepped: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
            return gradient.reshape(-1)[start:end]

        return self._gathered(parameter, gradient.dtype, part)

    def step(self) -> None:
        with use_groups(self._groups):
            _, norm, _ = self.optimizer.step()
        self._norm = None if norm is None else float(norm)
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def optimizer_state(self, name: str) -> Mapping[str, torch.Tensor]:
        parameter = self._parameters[name]
        if not parameter.requires_grad:
            return {}
        is_low_precision = parameter.dtype in LOW_PRECISION
        dtype = torch.float32 if is_low_precision else parameter.dtype
        moments = {
            moment: self._gathered(parameter, dtype, lambda start, end, stepped, state, of=moment: state[of])
            for moment in ("exp_avg", "exp_avg_sq")
        }
        if not is_low_precision:
            return moments
        return {**moments, "master": self._gathered(parameter, dtype, lambda start, end, stepped, state: stepped)}

    def ways_to_resume(self) -> Mapping[str, WayToResume]:
        return {}

    def _gathered(self, parameter: nn.Parameter, dtype: torch.dtype, part: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return what the DP ranks hold parts of. Collective over the DP group.

        Args:
            part: (start, end, stepped, state) -> this rank's part, from the first and last element of the flattened
                parameter, what the optimizer steps, and its state.
        """
        whole = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
        for start, end, stepped, state in self._parts(parameter):
            whole[start:end] = part(start, end, stepped, state).detach().reshape(-1)
        with use_groups(self._groups):
            group = parallel_state.get_data_parallel_group()
        dist.all_reduce(whole, group=group)  # every element is 0 on all ranks but one
        return whole.reshape(parameter.shape)

    def _parts(self, parameter: nn.Parameter) -> Iterator[tuple[int, int, torch.Tensor, Mapping[str, Any]]]:
        """Yield which elements of a parameter this rank steps, as what, and with which state; at most once."""
        for member in self.optimizers:
            of_groups = (
                (member.model_fp32_groups, member.shard_fp32_groups),
                (member.model_float16_groups, member.shard_fp32_from_float16_groups),
            )
            for models, shards in of_groups:
                for known, stepped in (
                    pair for pairs in zip(models, shards, strict=True) for pair in zip(*pairs, strict=True)
                ):
                    if known is parameter:
                        held = member._get_model_param_range_map(parameter)["param"]
                        yield held.start, held.end, stepped, member.optimizer.state[stepped]


def decayed_by_megatron(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that Megatron's optimizers decay by default: not vectors."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.dim() != 1)
