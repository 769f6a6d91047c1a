"""Training loops of Megatron's GPTModel with its DistributedDataParallel and `finalize_model_grads`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from tests.runs.loops.hand_written import VOCABULARY, Training
from tests.runs.loops.loop import Weights


class Megatron(Training):
    """GPTModel in a loop as Megatron's own: gradients in `main_grad`, reduced after the last micro-batch."""

    sequence = False

    def train(self) -> Weights:
        from tpcheck.backends.interface import TrainingOptions
        from tpcheck.backends.megatron import MegatronBackend
        from tpcheck.backends.megatron.config import configured
        from tpcheck.backends.megatron.session import groups_of_topology, use_groups

        settings = {"sequence_parallel": True} if self.sequence and self.run.tp > 1 else {}
        with ExitStack() as stack:
            stack.enter_context(MegatronBackend().session(TrainingOptions(dtype=self.dtype)))
            self.unsharded = self.build_gpt()
            stack.enter_context(use_groups(groups_of_topology(self.run.rank.topology)))
            stack.enter_context(configured(self.run.tp, settings))
            return super().train()

    def build_gpt(self) -> nn.Module:
        from tests.backends.megatron_models import gpt

        torch.manual_seed(self.model_seed)
        model = gpt(hidden_dropout=0.0, attention_dropout=0.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.to(self.dtype)  # type: ignore[no-any-return]

    def build(self) -> nn.Module:
        from tpcheck.backends.megatron.backend import fill_shards, parameter_layouts

        sharded = self.build_gpt()
        self.layouts = parameter_layouts(sharded, self.unsharded, self.run.tp)
        fill_shards(sharded, self.unsharded, self.layouts, self.run.rank)
        return sharded

    def wrap(self, model: nn.Module) -> Any:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def tokens(self, step: int) -> torch.Tensor:
        return super().tokens(step) % VOCABULARY

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.wrapped(tokens, positions, None, labels=labels).mean()  # type: ignore[no-any-return]

    def reduce_gradients(self) -> None:
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads([self.wrapped])
        for parameter in self.parameters().values():
            parameter.grad = parameter.main_grad  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        self.wrapped.zero_grad_buffer()
        for parameter in self.parameters().values():
            parameter.grad = None  # it is `main_grad`: the next backward pass would add that to itself

    def is_sharded(self, name: str) -> bool:
        return bool(getattr(self.parameters()[name], "tensor_model_parallel", False)) and self.run.tp > 1

    def weights(self) -> Weights:
        gathered = {}
        for name, parameter in self.parameters().items():
            parts = [torch.empty_like(parameter) for _ in range(self.run.tp)]
            torch.distributed.all_gather(parts, parameter.detach().contiguous(), group=self.run.rank.group("tp"))
            gathered[name] = self.layouts[name].assemble(parts)
        return gathered
