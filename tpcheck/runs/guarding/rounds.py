"""One check of `guard`: three small exchanges over the grid of ranks, more only where something differs."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan, sqrt
from typing import Any

import xxhash

from tpcheck.backends.live_groups import LiveGroups
from tpcheck.runs.guarding.findings import TENSORS, NotFinite
from tpcheck.runs.guarding.replica_digests import (
    Difference,
    Holding,
    Item,
    Label,
    SharedItems,
    Vote,
    decide_replicas,
    differences,
    merged,
)
from tpcheck.world.exchange import Exchange

AXES = ("tp", "dp")
# A rank that hangs keeps its TP group waiting, and that group the other replicas: its own group is to report it first.
_EXTRA_TIMEOUT_ACROSS_DP = 3.0  # seconds
# Biases of zeros are looked at again after steps; those that are constant even then are frozen, or get no gradients.
_MOST_DECISIONS_AFTER_STEPS = 3

_CHANGED, _DIFFERS, _NOT_FINITE = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Status:
    """What a rank, or a group of ranks, says at each check, before the digests: 40 bytes.

    Attributes:
        names: Digest of the identities of the rank's items.
        steps: Optimizer steps taken since `guard` was called; the most of any rank.
        calls_at_step: Calls of the model before the last of them.
        squares: Sum of squares of the gradients, where what several ranks hold counts once; NaN where there are none.
        flags: Whether identities have changed, something differs, something is not finite.
    """

    names: int
    steps: int
    calls_at_step: int
    squares: float
    flags: int = 0

    def packed(self) -> bytes:
        return _STATUS.pack(*(getattr(self, name) for name in self.__slots__))

    @classmethod
    def unpacked(cls, message: bytes) -> Status:
        return cls(*_STATUS.unpack(message[: _STATUS.size]))

    @classmethod
    def joined(cls, statuses: Sequence[Status]) -> Status:
        """Return what the ranks say together."""
        steps, calls_at_step = max((status.steps, status.calls_at_step) for status in statuses)
        known = [status.squares for status in statuses if not isnan(status.squares)]
        flags = 0
        for status in statuses:
            flags |= status.flags
        return cls(0, steps, calls_at_step, sum(known) if known else float("nan"), flags)


_STATUS = struct.Struct("<QqqdB7x")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a check, equal on every rank of the grid but for the numbers of tensors.

    Attributes:
        steps, calls_at_step: As of `Status`, of all ranks.
        norm: Of the gradients of the whole model; None where none were seen.
        differences: What differs, on which ranks.
        not_finite: Gradients that are not.
        num_tensors: How many tensors this rank shares with others.
        num_alone: How many it shares with none: shards, and partitions of ZeRO.
        not_compared: Why tensors are not, by name.
    """

    steps: int
    calls_at_step: int
    norm: float | None
    differences: tuple[Difference, ...]
    not_finite: tuple[NotFinite, ...]
    num_tensors: int
    num_alone: int
    not_compared: Mapping[str, str]


class Rounds:
    """The connections of a rank to its TP and DP groups, and what it knows of their items. Making it is collective.

    Attributes:
        exchanges: By axis.
        node_of: The name of the machine of each rank of the grid.
    """

    def __init__(self, groups: LiveGroups, *, timeout: float) -> None:
        purpose = "compared their replicas"
        self._rank = groups.rank
        tp = Exchange(groups.tp, axis="tp", timeout=timeout, purpose=purpose)
        dp = Exchange(groups.dp, axis="dp", timeout=timeout + _EXTRA_TIMEOUT_ACROSS_DP, purpose=purpose)
        tp.also_aborted_by, dp.also_aborted_by = (dp,), (tp,)
        self.exchanges = {"tp": tp, "dp": dp}
        self.node_of = dict(dp.node_of)
        for nodes in dp.all_gather_object(dict(tp.node_of)):
            self.node_of |= nodes
        self._shared = {axis: SharedItems({}, ()) for axis in AXES}
        self._names: int | None = None
        self._tp_replicas: dict[str, bool | None] = {}
        self._num_decisions = 0

    def agree(
        self,
        items: Sequence[Item],
        votes: Mapping[str, Vote],
        squares: Mapping[Label, float],
        *,
        steps: int,
        calls_at_step: int,
        right_at: Mapping[Label, int],
    ) -> Outcome:
        """Compare what this rank holds with what its peers hold. Collective over the grid.

        Args:
            items: What it holds, in the order of the model.
            votes: What it says of tensors whose layout over TP is unknown, by name.
            squares: Sum of squares of each gradient.
            steps, calls_at_step: As of `Status`.
            right_at: Steps at the last check that found an item equal.

        Raises:
            RankFailure: A rank has died, or does not come.
        """
        not_finite = [label[1] for label, square in squares.items() if not isfinite(square)]
        wants_decision = steps > 0 and bool(self.undecided()) and self._num_decisions < _MOST_DECISIONS_AFTER_STEPS
        while True:
            held = self._held(items)
            status = Status(
                _digest_of_names(held),
                steps,
                calls_at_step,
                self._counted_once(squares, held),
                _NOT_FINITE if not_finite else 0,
            )
            if status.names != self._names or wants_decision:
                status = replace(status, flags=status.flags | _CHANGED)
            world, differing = self._exchange(status, held)
            if not world.flags & _CHANGED:
                break
            self._learn_what_is_shared(items, votes)
            self._num_decisions += steps > 0
            wants_decision = False
        found: tuple[Difference, ...] = ()
        all_not_finite: tuple[NotFinite, ...] = ()
        if world.flags & (_DIFFERS | _NOT_FINITE):
            found, all_not_finite = self._find(held, differing, not_finite, right_at)
        norm = None if isnan(world.squares) else sqrt(world.squares)
        num_shared = self._num_shared(held)
        num_tensors = sum(item.label[0] in TENSORS for item in items)
        return Outcome(
            world.steps,
            world.calls_at_step,
            norm,
            found,
            all_not_finite,
            num_shared,
            num_tensors - num_shared,
            self._not_compared(votes),
        )

    def is_replica(self, name: str) -> bool | None:
        """Return whether all TP ranks hold the same elements of a tensor of unknown layout; None while undecided."""
        return self._tp_replicas.get(name)

    def undecided(self) -> frozenset[str]:
        """Return the names of tensors of which nobody knows yet whether TP ranks hold the same elements."""
        return frozenset(name for name, is_replica in self._tp_replicas.items() if is_replica is None)

    def _held(self, items: Sequence[Item]) -> dict[str, dict[int, Item]]:
        """Return the items by identity, for each axis."""
        return {
            axis: {
                identity: item
                for item in items
                if (identity := item.identity(axis, self._tp_replicas)) is not None
            }
            for axis in AXES
        }  # fmt: skip

    def _exchange(
        self, status: Status, held: Mapping[str, Mapping[int, Item]]
    ) -> tuple[Status, dict[str, frozenset[tuple[int, ...]]]]:
        """Return the status of the grid, and for each axis the sets of places in this rank's group that differ."""
        differing: dict[str, frozenset[tuple[int, ...]]] = {}
        for axis in AXES:
            digests = {identity: item.digest for identity, item in held[axis].items()}
            joined = self._shared[axis].joined_digests(digests)
            messages = self.exchanges[axis].all_gather(status.packed() + joined)
            status = Status.joined([Status.unpacked(message) for message in messages])
            differing[axis] = self._shared[axis].differing([message[_STATUS.size :] for message in messages])
            if differing[axis]:
                status = replace(status, flags=status.flags | _DIFFERS)
        # Each DP group has a rank of every TP group: what one DP group has found, all ranks hear over TP.
        flags = self.exchanges["tp"].all_gather(bytes([status.flags]))
        for flag in flags:
            status = replace(status, flags=status.flags | flag[0])
        return status, differing

    def _learn_what_is_shared(self, items: Sequence[Item], votes: Mapping[str, Vote]) -> None:
        undecided = {name: vote for name, vote in votes.items() if self._tp_replicas.get(name) is None}
        if len(self.exchanges["tp"].ranks) > 1:
            self._tp_replicas |= decide_replicas(self.exchanges["tp"].all_gather_object(undecided))
        held = self._held(items)
        for axis in AXES:
            identities = struct.pack(f"<{len(held[axis])}Q", *held[axis])
            gathered = self.exchanges[axis].all_gather_object(identities)
            self._shared[axis] = SharedItems.of([struct.unpack(f"<{len(each) // 8}Q", each) for each in gathered])
        self._names = _digest_of_names(held)

    def _find(
        self,
        held: Mapping[str, Mapping[int, Item]],
        differing: Mapping[str, frozenset[tuple[int, ...]]],
        not_finite: Iterable[str],
        right_at: Mapping[Label, int],
    ) -> tuple[tuple[Difference, ...], tuple[NotFinite, ...]]:
        """Return what differs in the whole grid, equal on all of its ranks."""
        found = {}
        for axis in AXES:
            holders, exchange = self._shared[axis].holders, self.exchanges[axis]
            holdings = {
                identity: Holding(item.label, item.digest, item.value, right_at.get(item.label))
                for identity, item in held[axis].items()
                if holders.get(identity) in differing[axis]
            }
            found[axis] = differences(exchange.ranks, exchange.all_gather_object(holdings))
        mine = (found["dp"], [NotFinite(name, self._rank) for name in not_finite])
        of_tp_group = self.exchanges["tp"].all_gather_object(mine)
        everywhere: Sequence[Any] = self.exchanges["dp"].all_gather_object((found["tp"], of_tp_group))
        within_tp = [difference for tp, _ in everywhere for difference in tp]
        # Every TP group has met all DP groups, so the first one's answer has all of theirs.
        across_dp = [difference for dp, _ in everywhere[0][1] for difference in dp]
        names = [each for _, of_group in everywhere for _, of_rank in of_group for each in of_rank]
        return tuple(merged([*within_tp, *across_dp])), tuple(names)

    def _counted_once(self, squares: Mapping[Label, float], held: Mapping[str, Mapping[int, Item]]) -> float:
        """Return the sum of the finite squares; what several ranks hold is divided by their number."""
        if not squares:
            return float("nan")
        divisors: dict[Label, int] = {}
        for axis in AXES:
            for identity, item in held[axis].items():
                if item.label in squares:
                    ranks = self._shared[axis].holders.get(identity, ())
                    divisors[item.label] = divisors.get(item.label, 1) * max(1, len(ranks))
        return sum(square / divisors.get(label, 1) for label, square in squares.items() if isfinite(square))

    def _num_shared(self, held: Mapping[str, Mapping[int, Item]]) -> int:
        labels = {
            item.label
            for axis in AXES
            for identity, item in held[axis].items()
            if identity in self._shared[axis].holders and item.label[0] in TENSORS
        }
        return len(labels)

    def _not_compared(self, votes: Mapping[str, Vote]) -> dict[str, str]:
        if len(self.exchanges["tp"].ranks) == 1:
            return {}
        reasons = {
            False: "its layout over TP is unknown and its ranks began with different bits: taken as shards",
            None: "its layout over TP is unknown and its elements are all equal: shards of it would be equal, too",
        }
        undecided_or_shards = {name: self.is_replica(name) for name in votes}
        return {name: reasons[known] for name, known in undecided_or_shards.items() if not known}


def _digest_of_names(held: Mapping[str, Mapping[int, Item]]) -> int:
    hasher = xxhash.xxh3_64()
    for axis in AXES:
        hasher.update(struct.pack(f"<{len(held[axis])}Qx", *sorted(held[axis])))
    return hasher.intdigest()
