"""Plain modules around layers that no single linear layer or embedding replaces, for `ParallelLayer.plain`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, silu

from tpcheck.backends.interface import LayerSizes

HEAD_DIM = 2
ROTARY_DIM = 2
NUM_EXPERTS = 4  # that 2 and 4 ranks divide
TOP_K = 2


def num_heads(sizes: LayerSizes) -> int:
    """Return a number of heads that the ranks divide."""
    return sizes.outputs * sizes.tp


class Heads(nn.Module):
    """Heads between a projection that is cut and one that adds up, like queries in attention.

    Args:
        norm: Whether each head is normalised by weights that all heads share.
        sinks: Whether each head is scaled by a parameter of its own.
    """

    def __init__(self, sizes: LayerSizes, *, norm: bool = False, sinks: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(sizes.inputs, num_heads(sizes) * HEAD_DIM, sizes.bias)
        self.q_norm = nn.RMSNorm(HEAD_DIM, eps=1e-5) if norm else nn.Identity()
        self.sinks = nn.Parameter(torch.empty(num_heads(sizes))) if sinks else None
        self.o_proj = nn.Linear(num_heads(sizes) * HEAD_DIM, sizes.inputs, sizes.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, HEAD_DIM)))
        if self.sinks is not None:
            heads = heads * self.sinks.sigmoid().unsqueeze(-1)
        output: torch.Tensor = self.o_proj(heads.flatten(-2))
        return output


class LatentAttention(nn.Module):
    """Keys of multi-head latent attention: a part of the latent goes by `kv_b_proj`, a part to every head as it is."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.kv_a_proj_with_mqa = nn.Linear(sizes.inputs, sizes.inputs + ROTARY_DIM, sizes.bias)
        self.kv_b_proj = nn.Linear(sizes.inputs, num_heads(sizes) * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(num_heads(sizes) * (HEAD_DIM + ROTARY_DIM), sizes.inputs, sizes.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        latent, rotary = self.kv_a_proj_with_mqa(hidden).split([hidden.shape[-1], ROTARY_DIM], dim=-1)
        keys = self.kv_b_proj(latent).unflatten(-1, (-1, HEAD_DIM))
        rotary = rotary.unsqueeze(-2).expand(*keys.shape[:-1], ROTARY_DIM)
        output: torch.Tensor = self.o_proj(torch.cat([keys, rotary], dim=-1).flatten(-2))
        return output


class Mlp(nn.Module):
    """A projection up, and one down."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.inputs, sizes.outputs, sizes.bias)
        self.down = nn.Linear(sizes.outputs, sizes.inputs, sizes.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down(silu(self.up(hidden)))
        return output


class Routed(nn.Module):
    """Experts of a library behind a router.

    Which experts a token goes to depends on its position alone: rounding cannot change it.

    Args:
        experts: Called with tokens, the experts of each, and their weights.
        num_choices: Number of experts to choose from.
    """

    def __init__(self, sizes: LayerSizes, experts: nn.Module, num_choices: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.router = nn.Linear(sizes.inputs, TOP_K, bias=False)
        self.experts = experts
        self._num_choices = num_choices

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        first = torch.arange(len(tokens), device=hidden.device).unsqueeze(-1)
        chosen = (first + torch.arange(TOP_K, device=hidden.device)) % self._num_choices
        output: torch.Tensor = self.experts(tokens, chosen, self.router(tokens).sigmoid())
        return output.view(hidden.shape)


class SharedByAll(nn.Module):
    """Experts that every token goes to, each with a weight of its own."""

    def __init__(self, sizes: LayerSizes, experts: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(sizes.inputs, NUM_EXPERTS, bias=False)
        self.experts = experts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.experts(hidden, self.router(hidden).sigmoid())
        return output


class SortedByExpert(nn.Module):
    """Experts that take a copy of every token for each expert, scaled by its score, as Llama 4's do."""

    def __init__(self, sizes: LayerSizes, experts: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(sizes.inputs, NUM_EXPERTS, bias=False)
        self.experts = experts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        scores = self.router(tokens).sigmoid().mT.reshape(-1, 1)
        outputs = self.experts(tokens.repeat(NUM_EXPERTS, 1) * scores)
        total: torch.Tensor = outputs.unflatten(0, (NUM_EXPERTS, -1)).sum(0)
        return total.view(hidden.shape)


class HeadWithLoss(nn.Module):
    """A head and the loss of each token, whose label depends on its position alone."""

    def __init__(self, sizes: LayerSizes, *, smoothing: float = 0.0) -> None:
        super().__init__()
        self.head = nn.Linear(sizes.inputs, sizes.outputs, sizes.bias)
        self.smoothing = smoothing

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden.reshape(-1, hidden.shape[-1]))
        labels = torch.arange(len(logits), device=hidden.device) % self.head.out_features
        return cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
