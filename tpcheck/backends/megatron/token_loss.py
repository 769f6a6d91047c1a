"""A language model of Megatron with what its training loop adds: positions, and one loss of all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What synthetic batches are drawn from."""

    vocab_size: int


class TokenLoss(nn.Module):
    """Returns the mean of the losses that a `GPTModel` returns for each token.

    Args:
        model: Called with token ids, positions, no attention mask (the layers' own is causal), and labels.

    Example:
        >>> TokenLoss(GPTModel(config, get_gpt_layer_local_spec(), 128, 16))  # doctest: +SKIP
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = Vocabulary(model.vocab_size)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        losses: torch.Tensor = self.model(input_ids, positions, None, labels=labels)
        return losses.mean()
