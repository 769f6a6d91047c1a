"""Ways to damage a tensor of a checkpoint; ranks, places and bits are drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpcheck.numerics.exact.rotary import Order

Tensors = Mapping[str, Tensor]
HEAD = 8  # rows


@dataclass(frozen=True, slots=True)
class Target:
    """The tensor to damage, and the rest of the checkpoint.

    Attributes:
        name: Its name.
        tensors: All tensors of the checkpoint.
        earlier: The tensors of the step before.
        generator: Draws ranks, places and bits.
    """

    name: str
    tensors: Tensors
    earlier: Tensors
    generator: random.Random

    @property
    def tensor(self) -> Tensor:
        """A copy of the tensor."""
        return self.tensors[self.name].clone()


@dataclass(frozen=True, slots=True)
class Damage:
    """The changes to a checkpoint.

    Attributes:
        changed: New tensors by name; None for a tensor that is removed.
        story: Details that a finding must report.
    """

    changed: Mapping[str, Tensor | None]
    story: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the damaged checkpoint."""
        damaged = {**tensors, **self.changed}
        return {name: tensor for name, tensor in damaged.items() if tensor is not None}


Harm = Callable[[Target], Damage]


def plain(change: Callable[[Tensor], Tensor | None], **story: Any) -> Harm:
    """Change the tensor in a way that needs no draw."""
    return lambda target: Damage({target.name: change(target.tensor)}, story)


def one_shard(num_ranks: int, dim: int = 0) -> Harm:
    """Keep one rank's chunk."""

    def harm(target: Target) -> Damage:
        tp_rank = target.generator.randrange(num_ranks)
        shard = target.tensor.chunk(num_ranks, dim)[tp_rank]
        return Damage({target.name: shard}, {"tp_rank": tp_rank, "tp": num_ranks, "dim": dim})

    return harm


def one_shard_of_blocks(num_blocks: int) -> Harm:
    """Keep one rank's half of every block."""

    def harm(target: Target) -> Damage:
        tp_rank = target.generator.randrange(2)
        blocks = target.tensor.chunk(num_blocks)
        shard = torch.cat([block.chunk(2)[tp_rank] for block in blocks])
        return Damage({target.name: shard}, {"tp_rank": tp_rank, "blocks": [len(block) for block in blocks]})

    return harm


def reordered(order: Callable[[random.Random], list[int]], dim: int = 0) -> Harm:
    """Reorder, repeat or leave out chunks."""

    def harm(target: Target) -> Damage:
        places = order(target.generator)
        chunks = target.tensor.chunk(len(places), dim)
        wrong = torch.cat([chunks[place] for place in places], dim)
        return Damage({target.name: wrong}, {"order": places, "dim": dim})

    return harm


def two_of_four_swapped(generator: random.Random) -> list[int]:
    order = [0, 1, 2, 3]
    first, second = generator.sample(order, 2)
    order[first], order[second] = second, first
    return order


def one_everywhere(generator: random.Random) -> list[int]:
    return [generator.randrange(2)] * 2


def one_for_another_of_four(generator: random.Random) -> list[int]:
    order = [0, 1, 2, 3]
    first, second = generator.sample(order, 2)
    order[first] = second
    return order


def blockwise(num_blocks: int, num_ranks: int, **story: Any) -> Harm:
    """Cut every block for the ranks, and concatenate each rank's parts of all blocks."""
    return plain(
        lambda tensor: torch.cat(
            [block.chunk(num_ranks)[rank] for rank in range(num_ranks) for block in tensor.chunk(num_blocks)]
        ),
        **story,
    )


def heads_of_qkv(tensor: Tensor) -> Tensor:
    """Read heads of (q, k, v) as (q, k, v) of heads."""
    return tensor.view(-1, 3, HEAD, tensor.shape[1]).transpose(0, 1).reshape(tensor.shape)


def groups_of_queries(target: Target) -> Damage:
    """Read groups of (4 query heads, key, value) as all queries, all keys, all values."""
    groups = target.tensor.chunk(len(target.tensor) // (6 * HEAD))
    parts = (slice(0, 4 * HEAD), slice(4 * HEAD, 5 * HEAD), slice(5 * HEAD, 6 * HEAD))
    wrong = torch.cat([group[rows] for rows in parts for group in groups])
    return Damage({target.name: wrong}, {"blocks": [size * HEAD * len(groups) for size in (4, 1, 1)]})


def at_a_boundary(change: Callable[[Tensor, int], Tensor], **offsets: int) -> Harm:
    """Call `change(tensor, row)` with a boundary that is drawn; offsets in the story are relative to it."""

    def harm(target: Target) -> Damage:
        row = len(target.tensor) // target.generator.choice((2, 4))
        return Damage({target.name: change(target.tensor, row)}, {key: row + more for key, more in offsets.items()})

    return harm


def padded(num_ranks: int) -> Harm:
    """Append 16 rows of zeros to each rank's rows."""

    def harm(target: Target) -> Damage:
        shards = target.tensor.chunk(num_ranks)
        zeros = torch.zeros(16, *target.tensor.shape[1:])
        wrong = torch.cat([piece for shard in shards for piece in (shard, zeros)])
        size = len(shards[0])
        starts = [(rank + 1) * size + rank * 16 for rank in range(num_ranks)]
        return Damage({target.name: wrong}, {"padding": [[start, start + 16] for start in starts]})

    return harm


def shifted(target: Target) -> Damage:
    rows = target.generator.choice((1, 5, 7))  # not a multiple of a shard, which would also be a swap of shards
    return Damage({target.name: torch.roll(target.tensor, rows, 0)})


def from_half_on(change: Callable[[Tensor], Tensor]) -> Harm:
    """Change the rows of the second of two ranks."""

    def harm(target: Target) -> Damage:
        first, second = target.tensor.chunk(2)
        return Damage({target.name: torch.cat([first, change(second)])})

    return harm


def one_bit(target: Target) -> Damage:
    tensor, bit = target.tensor, target.generator.randrange(23)  # of the mantissa: others would make infinities
    index = [target.generator.randrange(size) for size in tensor.shape]
    tensor.view(torch.int32)[tuple(index)] ^= 1 << bit
    return Damage({target.name: tensor}, {"bit": bit, "index": index})


def one_row(value: float) -> Harm:
    def harm(target: Target) -> Damage:
        tensor = target.tensor
        tensor[target.generator.randrange(len(tensor))] = value
        return Damage({target.name: tensor})

    return harm


def one_element(value: float) -> Harm:
    def harm(target: Target) -> Damage:
        tensor = target.tensor
        tensor[tuple(target.generator.randrange(size) for size in tensor.shape)] = value
        return Damage({target.name: tensor})

    return harm


def permuted(order: Callable[[int], Sequence[int]], dim: int = 0, **story: Any) -> Harm:
    """Cut the tensor into as many blocks as `order` is long for its size, and reorder them."""

    def harm(target: Target) -> Damage:
        places = order(target.tensor.shape[dim])
        blocks = target.tensor.chunk(len(places), dim)
        return Damage({target.name: torch.cat([blocks[place] for place in places], dim)}, {"dim": dim, **story})

    return harm


def keys_for_values(target: Target) -> Damage:
    """Exchange the last two of three blocks: all of them, or one rank's part."""
    rows = [*target.tensor.chunk(6)]
    if target.generator.randrange(2):
        order = [0, 1, 4, 5, 2, 3]
    else:
        order = target.generator.choice(([0, 1, 4, 3, 2, 5], [0, 1, 2, 5, 4, 3]))
    return Damage({target.name: torch.cat([rows[place] for place in order])})


def exchanged(word: str, other: str, num_ranks: int = 1) -> Harm:
    """Exchange the tensor and the one with the other word in its name: all rows, or those of a rank that is drawn."""

    def harm(target: Target) -> Damage:
        partner = target.name.replace(word, other)
        first, second = target.tensor, target.tensors[partner].clone()
        size, tp_rank = len(first) // num_ranks, target.generator.randrange(num_ranks)
        rows = slice(tp_rank * size, (tp_rank + 1) * size)
        first[rows], second[rows] = second[rows].clone(), first[rows].clone()
        return Damage({target.name: first, partner: second}, {"rows": [rows.start, rows.stop]})

    return harm


def half_split(head: int, rotated: int | None = None) -> Harm:
    """Take the pairs of rows that rotary embeddings turn apart, or put them together, in every head."""
    size = rotated or head

    def harm(target: Target) -> Damage:
        heads = target.tensor.reshape(-1, head, *target.tensor.shape[1:])
        order: Order = target.generator.choice(("half-split", "interleaved"))
        pairs = (-1, 2) if order == "half-split" else (2, -1)
        places = torch.arange(size).reshape(pairs).T.reshape(-1)
        heads[:, :size] = heads[:, places]
        return Damage({target.name: heads.reshape(target.tensor.shape)}, {"rotary_dim": size, "order": order})

    return harm


def of_another_layer(target: Target) -> Damage:
    """Replace the tensor by that of the same name in another layer."""
    same_name = [
        name
        for name in target.tensors
        if name != target.name and name.rpartition(".layers.")[2][1:] == target.name.rpartition(".layers.")[2][1:]
    ]
    other = target.generator.choice(same_name)
    return Damage({target.name: target.tensors[other].clone()}, {"equals": other})


def of_the_step_before(target: Target) -> Damage:
    return Damage({target.name: target.earlier[target.name].clone()})


def one_rank_of_the_step_before(target: Target) -> Damage:
    half = len(target.tensor) // 2
    return Damage({target.name: torch.cat([target.tensor[:half], target.earlier[target.name][half:]])})


def moments_of_one_rank(target: Target) -> Damage:
    """Replace the moments of all layers that a TP plan cuts by one rank's chunk."""
    tp_rank = target.generator.randrange(2)
    dims = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0),
        **dict.fromkeys(("o_proj", "down_proj"), 1),
    }
    changed = {
        name: tensor.chunk(2, dims[layer])[tp_rank].clone()
        for name, tensor in target.tensors.items()
        for layer in dims
        if name.endswith(f".{layer}.weight exp_avg")
    }
    return Damage(changed, {"tp": 2})


def every_tensor_of_one_rank(target: Target) -> Damage:
    """Replace every tensor by one rank's chunk."""
    tp_rank = target.generator.randrange(2)
    return Damage({name: tensor.chunk(2)[tp_rank] for name, tensor in target.tensors.items() if tensor.dim()})


def under_another_name(name: str) -> Harm:
    """Add a tensor that the reference does not have."""
    return lambda target: Damage({name: torch.randn_like(target.tensor)})


def untied(target: Target) -> Damage:
    """Store both names of a tie, with different values."""
    *_, last = _tied_with(target)
    return Damage({last: target.tensors[last] * 1.25})


def dropped_with_its_tie(target: Target) -> Damage:
    """Store neither name of a tie."""
    return Damage(dict.fromkeys(_tied_with(target)))


def _tied_with(target: Target) -> list[str]:
    storage = target.tensors[target.name].data_ptr()
    return [name for name, tensor in target.tensors.items() if tensor.data_ptr() == storage]
