"""A small decoder with tensor parallelism written by hand, and one place for each mistake that whole tensors show.

B: batch, L: length, H: heads, K: heads of keys and values, D: width, F: width inside the MLP, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.runs.loops.hand_written import CopyToRanks, SumOverRanks, _all_gather

VOCABULARY, WIDTH, HEADS, KV_HEADS, INNER, LENGTH, SAMPLES = 24, 32, 8, 4, 40, 8, 4


class Parallel(nn.Module):
    """A part of the model that knows its rank.

    Attributes:
        faults: Names of the mistakes to make.
    """

    def __init__(self, rank: Any, faults: Collection[str]) -> None:
        super().__init__()
        self.tp, self.tp_rank = rank.topology.tp, rank.tp_rank
        self.group = rank.group("tp") if self.tp > 1 else None
        self.faults = faults if self.tp > 1 else ()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.group is None else SumOverRanks.apply(tensor, self.group)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.group is None else CopyToRanks.apply(tensor, self.group)

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(self.tp, dim)[self.tp_rank].clone()


class Embedding(Parallel):
    def __init__(self, weight_VD: torch.Tensor, rank: Any, faults: Collection[str]) -> None:
        super().__init__(rank, faults)
        self.weight = nn.Parameter(self.cut(weight_VD, 0))
        self.first = self.tp_rank * len(self.weight) - (3 if "vocab_offset" in self.faults and self.tp_rank else 0)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        local_BL = tokens_BL - self.first
        is_here_BL = (local_BL >= 0) & (local_BL < len(self.weight))
        found_BLD = functional.embedding(local_BL.clamp(0, len(self.weight) - 1), self.weight)
        return self.sum(found_BLD * is_here_BL.unsqueeze(-1))


class Column(Parallel):
    """Output features, of each of some fused blocks; gathered where asked."""

    def __init__(
        self, weight: torch.Tensor, rank: Any, faults: Collection[str], *, blocks: int = 1, is_gathered: bool = False
    ) -> None:
        super().__init__(rank, faults)
        parts = weight.chunk(blocks) if "fused_contiguously" not in self.faults else [weight]
        self.weight = nn.Parameter(torch.cat([self.cut(part, 0) for part in parts]))
        self.is_gathered = is_gathered

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        output = functional.linear(self.copy(hidden_BLD), self.weight)
        if not self.is_gathered or self.group is None:
            return output
        parts = _all_gather(output.detach(), self.group)
        parts[self.tp_rank] = output  # each rank's own part has the gradient
        order = reversed(parts) if "gathered_in_another_order" in self.faults else parts
        return torch.cat(list(order), -1)


class Row(Parallel):
    """Input features; the bias is added after the sum."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, rank: Any, faults: Collection[str]) -> None:
        super().__init__(rank, faults)
        self.weight, self.bias = nn.Parameter(self.cut(weight, 1)), nn.Parameter(bias.clone())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if "half_reduced" in self.faults:  # the last samples are left as each rank has them
            product = functional.linear(hidden, self.weight)
            return torch.cat([self.sum(product[:-1]), product[-1:]]) + self.bias
        if "row_detached" in self.faults:
            return self.sum(functional.linear(hidden, self.weight).detach()) + self.bias
        bias = self.bias if "bias_on_each_rank" in self.faults else 0.0
        product = functional.linear(hidden, self.weight)
        return self.sum(product + bias) + (0.0 if "bias_on_each_rank" in self.faults else self.bias)


class WidthNorm(Parallel):
    """Divides by the root mean square over all features, of which each rank has some."""

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        squares_BL1 = hidden_BLD.square().sum(-1, keepdim=True)
        return hidden_BLD * (self.added_up(squares_BL1) / WIDTH + 1e-6).rsqrt()

    def added_up(self, squares_BL1: torch.Tensor) -> torch.Tensor:
        if "statistic_detached" in self.faults:
            return self.sum(squares_BL1.detach())
        summed_BL1 = self.sum(squares_BL1)
        return summed_BL1 if "statistic_of_own_terms" in self.faults else self.copy(summed_BL1)


class Mixer(Parallel):
    """Two matrices in one module."""

    def __init__(self, weights: dict[str, torch.Tensor], rank: Any, faults: Collection[str]) -> None:
        super().__init__(rank, faults)
        self.inner, self.outer = (nn.Parameter(self.cut(weights[f"mix_{name}"], dim)) for dim, name in enumerate("io"))

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        is_plain = "mixer_sums_without_backward" in self.faults
        given_BLD = hidden_BLD if is_plain else self.copy(hidden_BLD)
        return self.sum(functional.linear(functional.linear(given_BLD, self.inner).relu(), self.outer))


class Attention(Parallel):
    def __init__(self, weights: dict[str, torch.Tensor], rank: Any, faults: Collection[str]) -> None:
        super().__init__(rank, faults)
        self.q, self.k, self.v = (Column(weights[name], rank, ()) for name in "qkv")
        self.q_norm = WidthNorm(rank, faults)
        self.o = Row(weights["o"], weights["o_bias"], rank, ())

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        size = WIDTH // HEADS
        projected = self.q_norm(self.q(hidden_BLD)), self.k(hidden_BLD), self.v(hidden_BLD)
        q_BHLD, k_BKLD, v_BKLD = (each.unflatten(-1, (-1, size)).transpose(1, 2) for each in projected)
        times = HEADS // KV_HEADS
        if "kv_heads_repeated_in_turn" in self.faults:
            k_BHLD, v_BHLD = (each.repeat(1, times, 1, 1) for each in (k_BKLD, v_BKLD))
        else:
            k_BHLD, v_BHLD = (each.repeat_interleave(times, 1) for each in (k_BKLD, v_BKLD))
        found_BHLD = functional.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True)
        return self.o(found_BHLD.transpose(1, 2).flatten(2))


class Layer(Parallel):
    def __init__(self, weights: dict[str, torch.Tensor], rank: Any, faults: Collection[str]) -> None:
        super().__init__(rank, faults)
        self.attention = Attention(weights, rank, faults)
        self.gate_up = Column(weights["gate_up"], rank, faults, blocks=2)
        self.down = Row(weights["down"], weights["down_bias"], rank, faults)
        self.mixer = Mixer(weights, rank, faults)

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        hidden_BLD = hidden_BLD + self.attention(hidden_BLD)
        gate_BLF, up_BLF = self.gate_up(hidden_BLD).chunk(2, -1)
        hidden_BLD = hidden_BLD + self.down(functional.silu(gate_BLF) * up_BLF)
        return hidden_BLD + self.mixer(hidden_BLD)


class Decoder(Parallel):
    """Embedding, two layers, head; returns the loss."""

    def __init__(self, rank: Any, faults: Collection[str], seed: int = 0) -> None:
        super().__init__(rank, faults)
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2

        def layer(number: int) -> Layer:
            kv_width = WIDTH // HEADS * KV_HEADS
            weights = {
                "q": random(WIDTH, WIDTH),
                "k": random(kv_width, WIDTH),
                "v": random(kv_width, WIDTH),
                "o": random(WIDTH, WIDTH),
                "o_bias": random(WIDTH),
                "gate_up": random(2 * INNER, WIDTH),
                "down": random(WIDTH, INNER),
                "down_bias": random(WIDTH),
                "mix_i": random(WIDTH, WIDTH),
                "mix_o": random(WIDTH, WIDTH),
            }
            return Layer(weights, rank, faults if number else ())

        self.embedding = Embedding(random(VOCABULARY, WIDTH), rank, faults)
        self.layers = nn.ModuleList(map(layer, range(2)))
        self.head = Column(random(VOCABULARY, WIDTH), rank, faults, is_gathered=True)
        self.start()

    def start(self) -> None:
        """Load weights wrongly."""
        first, second = self.layers
        with torch.no_grad():
            if "transposed" in self.faults:
                second.attention.q.weight.copy_(self.gathered(second.attention.q.weight).T.chunk(self.tp)[self.tp_rank])
            if "another_layer" in self.faults:
                second.attention.k.weight.copy_(first.attention.k.weight)
            if "another_boundary" in self.faults:
                whole, size = self.gathered(second.attention.v.weight), len(second.attention.v.weight)
                start = self.tp_rank * size - self.tp_rank
                second.attention.v.weight.copy_(whole[start : start + size])
            if "swapped_shards" in self.faults:
                whole = self.gathered(second.attention.v.weight)
                second.attention.v.weight.copy_(whole.chunk(self.tp)[self.tp - 1 - self.tp_rank])
            if "rounded" in self.faults:
                second.attention.q.weight.copy_(second.attention.q.weight.bfloat16())

    def gathered(self, shard: torch.Tensor) -> torch.Tensor:
        return torch.cat(_all_gather(shard.detach(), self.group))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden_BLD = self.embedding(input_ids)
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD)
        logits_BLV = self.head(hidden_BLD)
        return functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
