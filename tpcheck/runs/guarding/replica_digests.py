"""What several ranks hold alike, and where it differs: joined digests for each set of ranks that share items.

An item is a tensor, or a number such as the learning rate. Its *identity* on an axis is equal on the ranks that should
hold the same bits: a hash of its label and of which elements of the whole tensor it has (`GlobalIndex.piece`). The
ranks of a group exchange identities when these change. From then on one digest for each set of ranks tells whether all
that they share is equal.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import xxhash

Label = tuple[str, str, str]  # kind as in `TensorRecord` or of a number; name; state or index

DIGEST_SIZE = 16


@dataclass(frozen=True, slots=True)
class Item:
    """Something that a rank holds and that peers may hold, too.

    Attributes:
        label: What it is.
        digest: Of dtype, shape and bits, or of the number.
        value: The number, in words; empty for tensors.
        tp_piece: Which elements; None where the layout over TP is unknown.
        dp_piece: Which elements of this TP rank's tensor; equal on DP replicas.
        axes: Over which peers may hold the same.
    """

    label: Label
    digest: bytes
    value: str
    tp_piece: str | None
    dp_piece: str
    axes: frozenset[str] = frozenset({"tp", "dp"})

    @classmethod
    def number(cls, kind: str, name: str, value: object, index: str = "") -> Item:
        """Return an item that all ranks of the grid should hold alike."""
        return cls((kind, name, index), xxhash.xxh3_128_digest(repr(value).encode()), str(value), "", "")

    def identity(self, axis: str, tp_replicas: Mapping[str, bool | None]) -> int | None:
        """Return its identity on an axis; None where no rank is known to hold the same.

        Args:
            axis: `tp` or `dp`.
            tp_replicas: For tensors whose layout is unknown, by name, whether all TP ranks hold the same elements.
        """
        if axis not in self.axes:
            return None
        piece: str | None = self.dp_piece
        if axis == "tp":
            piece = self.tp_piece
            if piece is None and tp_replicas.get(self.label[1]):
                piece = f"all of {self.dp_piece}"
        return None if piece is None else xxhash.xxh3_64_intdigest("\0".join((*self.label, piece)).encode())


@dataclass(frozen=True, slots=True)
class SharedItems:
    """Which items several ranks of one group hold.

    Attributes:
        holders: For each identity that more than one rank holds, the places of these ranks in the group.
        classes: The distinct sets of ranks, in the same order on each rank.
    """

    holders: Mapping[int, tuple[int, ...]]
    classes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, identities: Sequence[Iterable[int]]) -> SharedItems:
        """Return what is shared, given the identities that each rank of the group holds.

        Example:
            >>> SharedItems.of([[7, 8], [7, 9], [7, 8]]).holders
            {7: (0, 1, 2), 8: (0, 2)}
        """
        places: dict[int, list[int]] = defaultdict(list)
        for place, held in enumerate(identities):
            for identity in sorted(set(held)):
                places[identity].append(place)
        holders = {identity: tuple(ranks) for identity, ranks in places.items() if len(ranks) > 1}
        return cls(holders, tuple(sorted(set(holders.values()))))

    def joined_digests(self, digests: Mapping[int, bytes]) -> bytes:
        """Return one digest for each class, over the items of this rank that its ranks share.

        Args:
            digests: Of this rank's items, by identity.
        """
        hashers = {ranks: xxhash.xxh3_128() for ranks in self.classes}
        for identity in sorted(digests):
            if (ranks := self.holders.get(identity)) is not None:
                hashers[ranks].update(struct.pack("<Q", identity) + digests[identity])
        return b"".join(hashers[ranks].digest() for ranks in self.classes)

    def differing(self, joined: Sequence[bytes]) -> frozenset[tuple[int, ...]]:
        """Return the classes whose ranks sent different digests, given what each rank of the group sent."""
        found = set()
        for number, ranks in enumerate(self.classes):
            part = slice(number * DIGEST_SIZE, (number + 1) * DIGEST_SIZE)
            if len({joined[place][part] for place in ranks}) > 1:
                found.add(ranks)
        return frozenset(found)


# ---- tensors whose layout over TP nobody knows


@dataclass(frozen=True, slots=True)
class Vote:
    """What one TP rank says of a tensor whose layout is unknown.

    Attributes:
        digest: Of its bits.
        is_constant: All elements are equal, as those of biases and norm weights that were just initialised.
        is_whole: It cannot be a shard: a scalar, or a weight of a norm, whose statistics are over all of a dim.
        output: Digest of what its module returned in the first call, where each column of that goes with one of its
            elements; empty where that is unknown, or where shards of the output may be equal.
    """

    digest: bytes
    is_constant: bool
    is_whole: bool
    output: str = ""


def decide_replicas(votes: Sequence[Mapping[str, Vote]]) -> dict[str, bool | None]:
    """Return by name whether the ranks hold the same elements; None where that cannot be decided yet.

    Equal bits mean replicas, unless all elements are equal: the shards of a bias of zeros are equal, too. A vector
    whose module returned the same on all ranks, a column for each of its elements, is a replica even so.
    """
    decided: dict[str, bool | None] = {}
    for name in {name: None for of_rank in votes for name in of_rank}:
        of_ranks = [of_rank.get(name) for of_rank in votes]
        known = [vote for vote in of_ranks if vote is not None]
        if len(known) < len(of_ranks):
            decided[name] = False
        elif all(vote.is_whole for vote in known) or (known[0].output and len({vote.output for vote in known}) == 1):
            decided[name] = True
        elif len({vote.digest for vote in known}) > 1:
            decided[name] = False
        else:
            decided[name] = None if known[0].is_constant else True
    return decided


# ---- which items differ, on which ranks


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank says of an item once something differs.

    Attributes:
        label, digest, value: As of `Item`.
        right_at: Optimizer steps taken at the last check at which the item did not differ; None if there was none.
    """

    label: Label
    digest: bytes
    value: str
    right_at: int | None


@dataclass(frozen=True, slots=True)
class Difference:
    """An item that is not equal on the ranks that hold it.

    Attributes:
        label: What it is.
        digests, values: By global rank. Ranks that agree with all of their own peers may be missing.
        right_at: As of `Holding`, the earliest of all ranks.
    """

    label: Label
    digests: Mapping[int, bytes]
    values: Mapping[int, str]
    right_at: int | None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those that differ from the majority; all of them where there is none."""
        counts = Counter(self.digests.values()).most_common()
        majority = counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else None
        return tuple(sorted(rank for rank, digest in self.digests.items() if digest != majority))


def differences(ranks: Sequence[int], holdings: Sequence[Mapping[int, Holding]]) -> list[Difference]:
    """Return the items that differ within a group.

    Args:
        ranks: Global ranks of the group.
        holdings: What each of them holds, by identity.
    """
    found = []
    for identity in {identity: None for held in holdings for identity in held}:
        held = {rank: by_id[identity] for rank, by_id in zip(ranks, holdings, strict=True) if identity in by_id}
        if len({holding.digest for holding in held.values()}) > 1:
            first = next(iter(held.values()))
            found.append(
                Difference(
                    first.label,
                    {rank: holding.digest for rank, holding in held.items()},
                    {rank: holding.value for rank, holding in held.items()},
                    _earliest([holding.right_at for holding in held.values()]),
                )
            )
    return found


def merged(found: Iterable[Difference]) -> list[Difference]:
    """Join the differences of one item that were found in several groups with a rank in common.

    Of two ranks alone neither has the majority. The rank that both a TP and a DP group find is the one that differs.
    """
    by_label: dict[Label, list[Difference]] = defaultdict(list)
    for difference in found:
        known = by_label[difference.label]
        connected = [other for other in known if other.digests.keys() & difference.digests.keys()]
        group = [*connected, difference]
        union = Difference(
            difference.label,
            {rank: digest for each in group for rank, digest in each.digests.items()},
            {rank: value for each in group for rank, value in each.values.items()},
            _earliest([each.right_at for each in group]),
        )
        by_label[difference.label] = [other for other in known if other not in connected] + [union]
    return [difference for of_label in by_label.values() for difference in of_label]


def _earliest(steps: Sequence[int | None]) -> int | None:
    known = [step for step in steps if step is not None]
    return min(known) if len(known) == len(steps) else None
