"""A language model of Megatron with the positions and the mean loss that its training loop adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The configuration that tpcheck draws synthetic batches from."""

    vocab_size: int


class TokenLoss(nn.Module):
    """A `GPTModel` that returns the mean of its losses of all tokens.

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
