"""What can happen to a tensor on its way into a checkpoint: one row each, planted on a real model's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

# D 32 model, H 64 hidden, V 96 vocabulary; names as in a Llama with fused projections.
EMB, Q, Q1, OUT = "model.embed_tokens.weight", "layers.0.q.weight", "layers.1.q.weight", "layers.0.o.weight"
QKV, GATE_UP, BIAS, SQUARE = "layers.0.qkv.weight", "layers.0.gate_up.weight", "layers.0.bias", "layers.0.square"
EXPERTS, COUNT = "layers.0.experts", "layers.0.count"


def reference() -> Tensors:
    """Return tensors of every kind: vocabulary, column- and row-parallel, fused, 1-D, 3-D, integer."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        EMB: drawn(96, 32), Q: drawn(64, 32), Q1: drawn(64, 32), OUT: drawn(32, 64), QKV: drawn(96, 32),
        GATE_UP: drawn(128, 32), BIAS: drawn(64), SQUARE: drawn(32, 32), EXPERTS: drawn(4, 16, 32),
        COUNT: torch.tensor(3),
    }  # fmt: skip


def earlier() -> Tensors:
    """Return the tensors of an earlier step."""
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in reference().items()}


@dataclass(frozen=True, slots=True)
class Planted:
    """One fault.

    Attributes:
        label: What happened.
        name: The tensor that it happened to.
        cause: The only right cause; None where nothing can be told.
        change: Makes the wrong tensor from the right one; returns None to drop it.
        story: Details that must be found out.
    """

    label: str
    name: str
    cause: str | None
    change: Callable[[torch.Tensor], torch.Tensor | None]
    story: dict[str, Any] = field(default_factory=dict)

    def planted(self) -> Tensors:
        tensors = reference()
        changed = self.change(tensors.pop(self.name).clone())
        return tensors if changed is None else {**tensors, self.name: changed}


def _with(index: Any, value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def _flip(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int32)[3, 4] ^= 1 << 20
    return tensor


def _chunks(*order: int, dim: int = 0, number: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put chunks of a dim together in another order."""
    return lambda tensor: torch.cat([tensor.chunk(number or len(order), dim)[place] for place in order], dim)


def _blockwise(num_blocks: int, num_ranks: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Cut every block for the ranks, and put each rank's parts of all blocks one behind the other."""
    return lambda tensor: torch.cat(
        [block.chunk(num_ranks)[rank] for rank in range(num_ranks) for block in tensor.chunk(num_blocks)]
    )


def _per_group(tensor: torch.Tensor) -> torch.Tensor:
    """Two groups of (4 query heads, key, value) to all queries, all keys, all values; heads of 8."""
    groups = tensor.split(48)
    return torch.cat([group[rows] for rows in (slice(0, 32), slice(32, 40), slice(40, 48)) for group in groups])


def _rounded_behind(row: int, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.cat([tensor[:row], tensor[row:].to(dtype).to(tensor.dtype)])


def _padding(*places: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put 16 rows of zeros behind each of the places."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        ends = [0, *places]
        parts = [tensor[start:stop] for start, stop in zip(ends, [*places], strict=False)]
        return torch.cat([piece for part in parts for piece in (part, torch.zeros(16, *tensor.shape[1:]))])

    return change


FAULTS = (
    Planted("rank 0's rows", Q, "shard_missing", lambda q: q[:32], {"tp_rank": 0, "tp": 2, "dim": 0}),
    Planted("rank 3's rows of four", Q, "shard_missing", lambda q: q[48:], {"tp_rank": 3, "tp": 4}),
    Planted("rank 1's columns", OUT, "shard_missing", lambda o: o[:, 32:], {"tp_rank": 1, "dim": 1}),
    Planted("rank 1's part of a bias", BIAS, "shard_missing", lambda b: b[32:], {"tp_rank": 1}),
    Planted("rank 1's experts", EXPERTS, "shard_missing", lambda e: e[2:], {"tp_rank": 1, "dim": 0}),
    Planted("rank 0's part of each expert", EXPERTS, "shard_missing", lambda e: e[:, :8], {"tp_rank": 0, "dim": 1}),
    Planted("rank 0 of 3, uneven", Q, "shard_missing", lambda q: q[:22], {"tp_rank": 0, "tp": 3}),
    Planted("rank 2 of 3, uneven", Q, "shard_missing", lambda q: q[44:], {"tp_rank": 2, "tp": 3}),
    Planted(
        "rank 1's part of q, k and v", QKV, "shard_missing",
        lambda qkv: torch.cat([block[16:] for block in qkv.chunk(3)]), {"tp_rank": 1, "blocks": [32, 32, 32]},
    ),
    Planted("two ranks swapped", Q, "shard_order_swapped", _chunks(1, 0), {"order": [1, 0]}),
    Planted("two of four swapped", Q, "shard_order_swapped", _chunks(0, 2, 1, 3), {"order": [0, 2, 1, 3]}),
    Planted("columns swapped", OUT, "shard_order_swapped", _chunks(1, 0, dim=1), {"dim": 1}),
    Planted("ranks of an uneven cut swapped", Q, "shard_order_swapped", lambda q: torch.cat([q[39:], q[:39]])),
    Planted("rank 0 everywhere", Q, "shard_repeated", _chunks(0, 0), {"order": [0, 0]}),
    Planted("rank 1 everywhere, columns", OUT, "shard_repeated", _chunks(1, 1, dim=1), {"order": [1, 1], "dim": 1}),
    Planted("rank 0 for rank 1 of four", Q, "shard_repeated", _chunks(0, 0, 2, 3), {"order": [0, 0, 2, 3]}),
    Planted("qkv put together rank by rank", QKV, "fused_blocks_interleaved", _blockwise(3, 2), {"parts": 2}),
    Planted("gate and up put together rank by rank", GATE_UP, "fused_blocks_interleaved", _blockwise(2, 2)),
    Planted("gate and up of four ranks", GATE_UP, "fused_blocks_interleaved", _blockwise(2, 4)),
    Planted(
        "heads of (q, k, v) read as (q, k, v) of heads", QKV, "fused_blocks_interleaved",
        lambda qkv: qkv.view(4, 3, 8, 32).transpose(0, 1).reshape(96, 32),
    ),
    Planted("groups of (queries, key, value)", QKV, "fused_blocks_interleaved", _per_group, {"blocks": [64, 16, 16]}),
    Planted("a head twice", Q, "wrong_shard_boundary", lambda q: torch.cat([q[:40], q[32:]]), {"first_wrong": 40}),
    Planted("a head twice, the last lost", Q, "wrong_shard_boundary", lambda q: torch.cat([q[:32], q[24:56]])),
    Planted(
        "a head lost, zeros behind", Q, "wrong_shard_boundary",
        lambda q: torch.cat([q[:32], q[40:], torch.zeros(8, 32)]), {"first_wrong": 32, "holds": 40},
    ),
    Planted("padding of the hidden size", Q, "wrong_shard_boundary", _padding(64), {"padding": [[64, 80]]}),
    Planted("padding of the vocabulary", EMB, "vocab_offset_wrong", _padding(96), {"padding": [[96, 112]]}),
    Planted("padding on both ranks", EMB, "vocab_offset_wrong", _padding(48, 96), {"padding": [[48, 64], [112, 128]]}),
    Planted("tokens shifted", EMB, "vocab_offset_wrong", lambda emb: torch.roll(emb, 5, 0)),
    Planted("transposed", Q, "transposed", lambda q: q.T.contiguous()),
    Planted("transposed square", SQUARE, "transposed", lambda square: square.T.contiguous()),
    Planted("through bfloat16", Q, "dtype_rounded", lambda q: q.bfloat16().float(), {"dtype": "bfloat16"}),
    Planted("one rank's rows through float16", Q, "dtype_rounded", _rounded_behind(32, torch.float16)),
    Planted("through float8", Q, "dtype_rounded", lambda q: q.to(torch.float8_e4m3fn).float()),
    Planted("saved as bfloat16", Q, "dtype_rounded", lambda q: q.bfloat16(), {"dtype": "bfloat16"}),
    Planted("a shard saved as bfloat16", Q, "shard_missing", lambda q: q[:32].bfloat16(), {"tp_rank": 0}),
    Planted("saved as float64", Q, None, lambda q: q.double()),
    Planted("one bit", Q, "bit_flipped", _flip, {"bit": 20, "index": [3, 4]}),
    Planted("one bit of an integer", COUNT, "bit_flipped", lambda count: count ^ 4, {"bit": 2}),
    Planted("a row of NaN", Q, "not_finite", _with(3, float("nan"))),
    Planted("one infinity", Q, "not_finite", _with((0, 0), float("inf"))),
    Planted("zeros", Q, "all_zero", torch.zeros_like),
    Planted("one rank's rows are zero", Q, "all_zero", _with(slice(32, None), 0.0), {"rows": [32, 64]}),
    Planted("another layer's", Q, "tensor_of_another_layer", lambda q: reference()[Q1], {"equals": Q1}),
    Planted("added up over the ranks", BIAS, "duplicate_reduce", lambda bias: bias * 2, {"factor": 2}),
    Planted("gathered though whole", Q, "not_sharded", lambda q: torch.cat([q, q]), {"copies": 2}),
    Planted("of the step before", Q, "stale_weight", lambda q: earlier()[Q]),
    Planted("one rank's rows of the step before", Q, "stale_weight", lambda q: torch.cat([q[:32], earlier()[Q][32:]])),
    Planted("dropped", Q, "tensor_missing", lambda q: None),
    Planted("drawn anew", Q, None, lambda q: torch.randn_like(q)),
    Planted("drawn anew in another shape", Q, None, lambda q: torch.randn(60, 32)),
    Planted("one element moved a little", Q, None, _with((1, 1), 0.123)),
    Planted("other dims", Q, None, lambda q: q.reshape(2, 32, 32)),
)  # fmt: skip
