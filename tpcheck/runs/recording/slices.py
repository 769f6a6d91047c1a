"""Context parallelism: which positions of which samples a rank of a CP group is called with.

A digest of a sample adds up over its slices, so the ranks exchange sums of 16 bytes for each sample and each order in
which their slices may follow each other, and each then knows the digests of the whole samples: `contiguous`, where rank
r of n has part r of n, `zigzag`, where it has parts r and 2n - 1 - r of 2n, and `positions`, where the model is called
with positions that lie otherwise and are all there. Which order is right, `compare` decides by the other run's samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import nn

from tpcheck.core.digests import splitmix
from tpcheck.numerics.sketch import TILES, keys_of_sums, sample_keys, slice_sums
from tpcheck.world.exchange import Exchange

CONTIGUOUS, ZIGZAG, POSITIONS = "contiguous", "zigzag", "positions"
FROM_ZERO = "from 0 on each rank"
SECONDS_TO_WAIT = 1800.0  # as torch waits in collectives: the model's own are in the same call

_STREAM = 7 << 50  # of the hash of positions, far from those of samples and rows


@dataclass(frozen=True, slots=True)
class Slices:
    """The slices that one rank is called with, under one order.

    Attributes:
        order: `contiguous`, `zigzag` or `positions`.
        samples: Digests of the whole samples, int64 [B].
        positions: Of this rank's n tokens, int64 [n] or [B, n].
        length: Of the whole samples.
        piece: Names the slice, such as `slice 1/2`.
    """

    order: str
    samples: torch.Tensor
    positions: torch.Tensor
    length: int
    piece: str


@dataclass(frozen=True, slots=True)
class SlicedCall:
    """What the ranks of a CP group are called with.

    Attributes:
        slices: Under each order; empty where the tensors are no slices of equal length.
        positions: Which positions the ranks are called with: an order, or `from 0 on each rank`; else empty.
    """

    slices: tuple[Slices, ...] = ()
    positions: str = ""


class ContextGroup:
    """The ranks that hold slices of the same samples."""

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self.size, self.rank = len(ranks), ranks.index(rank)
        self._exchange = Exchange(ranks, axis="cp", timeout=SECONDS_TO_WAIT, purpose="recorded a call of the model")

    def slices(self, leaf: torch.Tensor | None, positions: torch.Tensor | None) -> SlicedCall:
        """Return the slices under each order. Collective.

        Args:
            leaf: [B, n, ...], what the model is called with; None where that has no positions.
            positions: [n] or [B, n], those that the model is called with.
        """
        by_order = {} if leaf is None else self._positions_by_order(leaf.shape[1], positions, leaf.device)
        sums = {} if leaf is None else {order: slice_sums(leaf, each) for order, each in by_order.items()}
        message = (
            None if leaf is None else tuple(leaf.shape),
            {order: of_order.tolist() for order, (of_order, _) in sums.items()},
            _hash_of(by_order[POSITIONS]) if POSITIONS in by_order else None,
            _followed(by_order),
        )
        messages = self._exchange.all_gather_object(message)
        if leaf is None or any(shape != tuple(leaf.shape) for shape, *_ in messages):
            return SlicedCall()
        length = leaf.shape[1] * self.size
        orders = [order for order in by_order if all(order in of_rank for _, of_rank, *_ in messages)]
        followed = [order for order in messages[0][3] if all(order in of_rank for *_, of_rank in messages)]
        if POSITIONS in orders and (followed or not self._are_whole(messages, length)):
            orders.remove(POSITIONS)
        found = []
        for order in orders:
            whole = torch.tensor([of_rank[order] for _, of_rank, *_ in messages], dtype=torch.int64).sum(0)
            samples = keys_of_sums(whole, length * sums[order][1]).to(leaf.device)
            found.append(Slices(order, samples, by_order[order], length, f"slice {self.rank}/{self.size}"))
        return SlicedCall(tuple(found), POSITIONS if POSITIONS in orders else next(iter(followed), ""))

    def _positions_by_order(
        self, number: int, positions: torch.Tensor | None, device: torch.device
    ) -> dict[str, torch.Tensor]:
        by_order = {CONTIGUOUS: torch.arange(number, device=device) + self.rank * number}
        if number % 2 == 0:
            part = torch.arange(number // 2, device=device)
            last = 2 * self.size - 1 - self.rank
            by_order[ZIGZAG] = torch.cat([part + self.rank * len(part), part + last * len(part)])
        if positions is not None:
            by_order[POSITIONS] = positions.to(device, torch.int64)
        return by_order

    @staticmethod
    def _are_whole(messages: Sequence[Any], length: int) -> bool:
        """Return whether the ranks' positions are all of the whole, once each."""
        hashes = [hashed for _, _, hashed, _ in messages]
        if any(len(hashed) != len(hashes[0]) for hashed in hashes):
            return False
        expected = _hash_of(torch.arange(length))
        return all(
            int(torch.tensor(of_sample, dtype=torch.int64).sum()) == expected[0]
            for of_sample in zip(*hashes, strict=True)
        )


def _hash_of(positions: torch.Tensor) -> list[int]:
    """Return for each row a hash of the set of its positions, which adds up over sets without common positions."""
    hashed: list[int] = splitmix(positions.reshape(-1, positions.shape[-1]) + _STREAM).sum(1).tolist()
    return hashed


def _followed(by_order: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what the positions that the model is called with follow: orders, or a beginning at 0."""
    if POSITIONS not in by_order:
        return []
    given = by_order[POSITIONS]
    known = {order: by_order[order] for order in (CONTIGUOUS, ZIGZAG) if order in by_order}
    known[FROM_ZERO] = torch.arange(given.shape[-1], device=given.device)
    return [name for name, positions in known.items() if bool((given == positions).all())]


def positions_among(
    model: nn.Module, named: Sequence[tuple[str, torch.Tensor]], batch: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the positions, [n] or [B, n], that a model is called with: integers under a name that says so.

    Args:
        named: The tensors of the call by their place in the arguments.
        batch: [B, n, ...], what they are the positions of.
    """
    if batch is None or batch.dim() < 2:
        return None
    for path, tensor in _with_names(model, named):
        shape = tuple(tensor.shape)
        is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
        if tensor is not batch and is_integer and "position" in path.lower():
            if shape in (tuple(batch.shape[1:2]), (1, batch.shape[1])):
                return tensor.detach().reshape(-1)
            if shape == tuple(batch.shape[:2]):
                return tensor.detach()
    return None


def _with_names(model: nn.Module, named: Sequence[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors under the names of the arguments of the model's forward where they were given by place."""
    parameters = list(inspect.signature(model.forward).parameters)
    for path, tensor in named:
        first, dot, rest = path.partition(".")
        if first.isdigit() and int(first) < len(parameters):
            first = parameters[int(first)]
        yield f"{first}{dot}{rest}", tensor


def digests_of_pieces(leaf: torch.Tensor | None, num_slices: int) -> torch.Tensor | None:
    """Return digests of equal pieces of each sample or slice, [B, pieces]: up to 16 of a whole sample.

    Unlike those of samples they do not depend on where a piece lies, so that a slice of another sample is recognised.

    Args:
        leaf: [B, n, ...].
        num_slices: Of which whole samples are made up.
    """
    if leaf is None or leaf.dim() < 2 or not leaf.numel():
        return None
    batch, number = leaf.shape[:2]
    whole = number * num_slices
    size = whole // gcd(whole, TILES)
    if number % size:
        return None
    return sample_keys(leaf.detach().reshape(batch * (number // size), size, *leaf.shape[2:])).reshape(batch, -1)
