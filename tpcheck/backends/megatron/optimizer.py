"""SGD that clips by Megatron's gradient norm, to which each parameter counts once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from tpcheck.adapters import TrainingOptions
from tpcheck.backends.sgd import Sgd


def sgd_of(model: nn.Module, options: TrainingOptions) -> Sgd:
    """Return what steps the model's parameters, in place of Megatron's optimizers, which need CUDA."""
    parameters = [one for one in model.parameters() if one.requires_grad]

    def clip(masters: Sequence[torch.Tensor], max_norm: float) -> float:
        counted = [
            master.grad
            for parameter, master in zip(parameters, masters, strict=True)
            if master.grad is not None
            and param_is_not_shared(parameter)
            and param_is_not_tensor_parallel_duplicate(parameter)
        ]
        norm: float = get_grad_norm_fp32(counted, grad_stats_parallel_group=parallel_state.get_model_parallel_group())
        if max_norm > 0:
            clip_grads_with_norm_(masters, max_norm, torch.tensor(norm, dtype=torch.float64))
        return norm

    return Sgd(parameters, options, clip)
