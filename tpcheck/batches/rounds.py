"""The ranks whose batches are compared, and one round: each sends what it has, and all come to the same outcome."""

from __future__ import annotations

import struct
import traceback
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import distributed as dist

from tpcheck.backends.live_groups import ALONE, LiveGroups, groups_of_batches
from tpcheck.batches.causes import explain_difference, explain_once, explain_same_samples, with_cause
from tpcheck.batches.comparison import (
    LeafDifference,
    batches_agree_within_tp,
    batches_differ_across_dp,
    leaf_differences,
    same_samples,
    samples_come_once,
    uneven_batches,
)
from tpcheck.batches.leaves import DigestedBatch, LeafContent, as_tensor
from tpcheck.batches.locate import locate
from tpcheck.batches.records import BatchSummary, ContentDigests
from tpcheck.batches.repeats import Gap, Repeat, SampleMemory
from tpcheck.batches.samples import Samples, any_order, content_digests, samples_of
from tpcheck.batches.sampling import BatchProvenance
from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.errors import RankFailure, RankOutcome
from tpcheck.core.findings import Finding
from tpcheck.core.topology import Topology
from tpcheck.world.exchange import Exchange

AXES = frozenset({"tp", "dp"})
# Connections live as long as torch's default group: a loop may call `check_batch` at every step.
_peers: WeakKeyDictionary[Any, dict[Any, Peers]] = WeakKeyDictionary()
# A rank that hangs keeps its TP group waiting, and that group the other replicas: its own group is to report it first.
_EXTRA_TIMEOUT_ACROSS_DP = 3.0  # seconds


@dataclass(frozen=True, slots=True)
class Peers:
    """This rank's place and the connections to its peers.

    Attributes:
        groups: The ranks, and where the groups come from.
        tp, dp: Exchange with the ranks of the TP group, and with this rank's counterparts in the other replicas.
        replicas: TP group of each of those counterparts, in their order.
        node_of: The name of the machine of each rank in them; empty where there is one rank.
    """

    groups: LiveGroups
    tp: Exchange
    dp: Exchange
    replicas: tuple[tuple[int, ...], ...]
    node_of: Mapping[int, str] = field(default_factory=dict)

    def exchange(self, axis: str) -> Exchange:
        """Return the exchange over `tp` or `dp`."""
        return self.tp if axis == "tp" else self.dp

    def printing_rank(self, finding: Finding) -> int:
        """Return the first rank of the group that a finding concerns: it prints the report.

        Where some ranks have no more batches, one that has: the others may have left their loops.
        """
        ranks = set(finding.where.get("ranks", ()))
        concerned = [
            rank
            for group in self.replicas
            if finding.check == "batches_differ_across_dp" or ranks & set(group)
            for rank in group
        ]
        still_there = [rank for rank in concerned if rank not in ranks]
        return min((finding.evidence.get("differs") == "length" and still_there) or concerned, default=0)

    def members(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Return the ranks behind each message of an exchange: one rank over `tp`, its TP group over `dp`."""
        return tuple((rank,) for rank in self.tp.ranks) if axis == "tp" else self.replicas

    def abort(self, failure: RankFailure) -> None:
        """Make every rank that waits for this one raise the failure."""
        self.tp.abort(failure)
        self.dp.abort(failure)


def find_peers(
    *, group: Any = None, topology: Topology | None = None, model: Any = None, timeout: float, shared: bool = True
) -> Peers:
    """Return the peers that `groups_of_batches` finds. The first time, collective over them.

    Args:
        group, topology, model: As in `groups_of_batches`.
        timeout: Seconds that ranks wait for each other.
        shared: Use connections that others use, too; a thread of its own must not.

    Raises:
        UsageError: See `groups_of_batches`.
        RankFailure: One of them does not come.
    """
    groups = groups_of_batches(group=group, topology=topology, model=model)
    if groups.source == ALONE:
        return Peers(
            groups, Exchange((0,), axis="tp", timeout=timeout), Exchange((0,), axis="dp", timeout=timeout), ((0,),)
        )
    cache = _peers.setdefault(dist.group.WORLD, {})
    key = (groups.tp, groups.dp, timeout)
    peers = cache.get(key) if shared else None
    if peers is None or peers.tp.broken or peers.dp.broken:
        tp = Exchange(groups.tp, axis="tp", timeout=timeout)
        dp = Exchange(groups.dp, axis="dp", timeout=timeout + _EXTRA_TIMEOUT_ACROSS_DP)
        tp.also_aborted_by, dp.also_aborted_by = (dp,), (tp,)
        replicas = dp.all_gather_object((groups.tp, dict(tp.node_of)))
        node_of = dict(dp.node_of) | {rank: node for _, nodes in replicas for rank, node in nodes.items()}
        peers = Peers(groups, tp, dp, tuple(tp_group for tp_group, _ in replicas), node_of)
        if shared:
            cache[key] = peers
    return replace(peers, groups=groups)


class Status(IntEnum):
    """What a rank has in a round."""

    BATCH = 0
    ENDED = 1  # its loader has no more batches
    LEFT = 2  # its loop takes no more batches; it does not wait for this round
    FAILED = 3  # its loader has raised, or that of a rank in its TP group
    WRONG = 4  # its TP group has a finding


@dataclass(frozen=True, slots=True)
class RoundMessage:
    """What one rank sends in every round, and all that is sent while nothing is wrong: 48 bytes.

    Attributes:
        digest: Of all leaves.
        rows: Of the samples in any order, None where the batch has no rows.
        count: How many batches the rank has got before this round.
        status: What it has.
        noticed: Whether samples have come again, or have been left out, on this rank or another one of its TP group.
    """

    digest: bytes
    rows: bytes | None
    count: int
    status: Status
    noticed: bool = False

    def pack(self) -> bytes:
        has_rows = self.rows is not None
        return _FORMAT.pack(self.digest, self.rows or b"", self.count, self.status, has_rows, self.noticed)

    @classmethod
    def unpack(cls, message: bytes) -> RoundMessage:
        digest, rows, count, status, has_rows, noticed = _FORMAT.unpack(message)
        return cls(digest, rows if has_rows else None, count, Status(status), noticed)


_FORMAT = struct.Struct("<16s16sqB??5x")


class RankBatch:
    """What one rank has at one step. The digests of its batch are computed from the moment that this is made."""

    def __init__(
        self,
        status: Status,
        *,
        step: int,
        count: int,
        batch: Any = None,
        provenance: BatchProvenance | None = None,
        with_rows: bool = False,
        memory: SampleMemory | None = None,
        error: BaseException | None = None,
    ) -> None:
        self.status, self.step, self.count = status, step, count
        self.error = None if error is None else LoaderError.of(error)
        self._provenance = provenance or BatchProvenance()
        self._batch = DigestedBatch(batch) if status is Status.BATCH else None
        self._with_rows = with_rows
        self.memory = memory

    @property
    def contents(self) -> list[LeafContent]:
        return [] if self._batch is None else self._batch.contents

    @property
    def unread(self) -> dict[str, str]:
        """The types of what in the batch is not compared, by path."""
        return {} if self._batch is None else self._batch.unread

    @cached_property
    def noticed(self) -> Repeat | Gap | None:
        """What the memory of this rank's samples makes of the batch, or of the end of the epoch."""
        if self.memory is None:
            return None
        if self._batch is not None:
            return self.memory.add(self._batch.samples, self._provenance, self.step)
        return self.memory.end() if self.status is Status.ENDED else None

    def message(self, status: Status | None = None, *, noticed: bool = False) -> RoundMessage:
        """Return what is sent at every step."""
        return RoundMessage(
            digest=b"" if self._batch is None else self._batch.fingerprint,
            rows=any_order(self._batch.rows_or_texts) if self._batch is not None and self._with_rows else None,
            count=self.count,
            status=self.status if status is None else status,
            noticed=noticed or self.noticed is not None,
        )

    def summary(self) -> BatchSummary:
        """Return what is sent when something is wrong."""
        return BatchSummary(
            leaves=() if self._batch is None else self._batch.leaves,
            rows=() if self._batch is None else self._batch.samples,
            rng=dict(self._provenance.rng),
            loader=self._provenance.loader_facts(),
        )

    def samples(self) -> Samples:
        """Return the samples, and how much they say; read from the batch once more."""
        return Samples("", (), 0.0) if self._batch is None else samples_of(self._batch)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by path, and the arrays whose dtype torch has."""
        tensors = {leaf.path: as_tensor(leaf) for leaf in self.contents}
        return {path: tensor for path, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class LoaderError:
    """An exception as text: its class may exist on one rank alone."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> LoaderError:
        return cls(type(error).__qualname__, str(error), "".join(traceback.format_exception(error)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a round; the same on every rank.

    Attributes:
        findings: What is wrong.
        failure: A rank's loader raised.
        uneven: Axes over which ranks have different numbers of batches: they are not compared any more in this epoch.
        noticed: Whether the samples of some rank have come again, or have been left out: to be gathered.
    """

    findings: tuple[Finding, ...] = ()
    failure: RankFailure | None = None
    uneven: frozenset[str] = frozenset()
    noticed: bool = False

    @property
    def is_clean(self) -> bool:
        return self.failure is None and not self.findings


class EqualSamples:
    """How improbable it is that replicas have equal samples by chance, over the rounds so far.

    Samples of few bits, such as labels, are often equal by chance; several batches of them are not.
    """

    ENOUGH_BITS = 40.0  # one in 10^12

    def __init__(self) -> None:
        self.bits = 0.0
        self._rows: tuple[bytes | None, ...] = ()
        self._is_new = True

    def may_exist(self, rows: tuple[bytes | None, ...]) -> bool:
        """Return whether the samples of some replicas are equal in this round."""
        self._is_new, self._rows = rows != self._rows, rows
        known = [digest for digest in rows if digest is not None]
        equal = len(set(known)) < len(known)
        if not equal:
            self.bits = 0.0
        return equal

    def are_beyond_chance(self, bits: float | None) -> bool:
        """Add the bits of this round's equal samples, None where no samples are equal."""
        if bits is None:
            self.bits = 0.0
        elif self._is_new:  # a batch that is the same at every step is no further evidence
            self.bits += bits
        return self.bits >= self.ENOUGH_BITS


def compare(peers: Peers, batch: RankBatch, *, axes: frozenset[str], equal_samples: EqualSamples | None) -> Outcome:
    """Compare this round's batches, and return the outcome, which is the same on every rank. Collective.

    Args:
        peers: Who compares.
        batch: This rank's.
        axes: Over which the ranks are compared: `tp`, `dp` or both.
        equal_samples: Of the rounds so far; None leaves the samples of replicas uncompared.

    Raises:
        RankFailure: A rank has gone.
    """
    try:
        outcome = _compare_within_tp(peers, batch) if "tp" in axes else Outcome(noticed=batch.noticed is not None)
        if "dp" in axes:
            outcome = _compare_across_dp(peers, batch, outcome, equal_samples)
        return _gather_noticed(peers, batch, axes) if outcome.is_clean and outcome.noticed else outcome
    except RankFailure as failure:
        peers.abort(failure)
        raise


def outcome_after_leaving(peers: Peers, axis: str, step: int) -> Outcome:
    """Return the outcome of the round in which this rank left its loop; it has not waited for that."""
    messages = peers.exchange(axis).wait()
    if messages is None:
        return Outcome()
    return _uneven([RoundMessage.unpack(message) for message in messages], axis, step, peers.members(axis))


def _compare_within_tp(peers: Peers, batch: RankBatch) -> Outcome:
    exchange = peers.tp
    if len(exchange.ranks) == 1:
        errors = {} if batch.error is None else {exchange.ranks[0]: batch.error}
        return Outcome(
            failure=loader_failure(errors, batch.count) if errors else None, noticed=batch.noticed is not None
        )
    packed = batch.message().pack()
    received = exchange.all_gather(packed)
    if received.count(packed) == len(received) and batch.status is Status.BATCH:
        return Outcome(noticed=batch.noticed is not None)
    messages = [RoundMessage.unpack(message) for message in received]
    statuses = {message.status for message in messages}
    if Status.FAILED in statuses:
        # Ranks that have left do not answer.
        left = Status.LEFT in statuses
        errors = {} if left else dict(zip(exchange.ranks, exchange.all_gather_object(batch.error), strict=True))
        return Outcome(failure=loader_failure(errors, batch.count))
    outcome = outcome_within_tp(messages, step=batch.step, members=peers.members("tp"))
    if outcome is None:
        return _find_difference(peers, batch)
    return replace(outcome, noticed=_all_answer(messages) and any(message.noticed for message in messages))


def _all_answer(messages: Sequence[RoundMessage]) -> bool:
    return all(message.status in (Status.BATCH, Status.ENDED) for message in messages)


def outcome_within_tp(
    messages: Sequence[RoundMessage], *, step: int, members: Sequence[Sequence[int]]
) -> Outcome | None:
    """Return the outcome for a TP group whose loaders have not raised; None where its batches differ.

    Args:
        messages: Of each rank.
        step: How many batches came before.
        members: The rank of each message, as a tuple.
    """
    uneven = _uneven(messages, "tp", step, members)
    if uneven.findings or any(message.status is not Status.BATCH for message in messages):
        return uneven
    return Outcome() if len({message.digest for message in messages}) == 1 else None


def _compare_across_dp(peers: Peers, batch: RankBatch, outcome: Outcome, equal_samples: EqualSamples | None) -> Outcome:
    """Return the outcome over all replicas; `outcome` is that of this rank's TP group."""
    exchange = peers.dp
    if len(exchange.ranks) == 1:
        return outcome
    status = Status.FAILED if outcome.failure else Status.WRONG if outcome.findings else batch.status
    own = batch.message(status, noticed=outcome.noticed)
    messages = [RoundMessage.unpack(message) for message in exchange.all_gather(own.pack())]
    noticed = _all_answer(messages) and any(message.noticed for message in messages)
    action = action_across_dp({message.status for message in messages}, outcome)
    if action == "keep":
        return outcome
    if action == "compare samples":
        rows = tuple(message.rows for message in messages)
        if equal_samples is None or not equal_samples.may_exist(rows):
            return replace(outcome, noticed=noticed)
        finding = _find_equal_samples(peers, batch, equal_samples)
        result = Outcome() if finding is None else Outcome((finding,))
    elif action == "merge":
        result = merge_outcomes(exchange.all_gather_object(outcome))
    else:
        result = _uneven(messages, "dp", batch.step, peers.replicas)
    result = replace(result, noticed=noticed)
    if result.is_clean or not outcome.is_clean:
        return result
    # Every DP group sees a part of what is wrong, so the ranks of each TP group all come here.
    return most_severe(peers.tp.all_gather_object(result))


def action_across_dp(
    statuses: Set[Status], outcome: Outcome
) -> Literal["compare samples", "merge", "keep", "compare lengths"]:
    """Return what the replicas do next.

    Args:
        statuses: Of all replicas; WRONG or FAILED for this one where its outcome is not clean.
        outcome: Of this rank's TP group.
    """
    if statuses == {Status.BATCH}:
        return "compare samples"
    if statuses & {Status.FAILED, Status.WRONG} and Status.LEFT not in statuses:
        return "merge"
    if not outcome.is_clean:  # a replica has left: it does not answer
        return "keep"
    return "compare lengths"


def most_severe(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome to report: a failure, else a finding within a TP group, else one across replicas."""

    def severity(outcome: Outcome) -> tuple[bool, bool]:
        within = any(finding.check == "batches_agree_within_tp" for finding in outcome.findings)
        return outcome.failure is not None, within

    return max(outcomes, key=severity)


def merge_outcomes(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcomes of all replicas as one."""
    return Outcome(
        tuple(finding for outcome in outcomes for finding in outcome.findings),
        next((outcome.failure for outcome in outcomes if outcome.failure is not None), None),
        AXES if any(outcome.uneven for outcome in outcomes) else frozenset(),
    )


def _uneven(messages: Sequence[RoundMessage], axis: str, step: int, members: Sequence[Sequence[int]]) -> Outcome:
    """Return a finding where some have ended, or have got fewer batches than others."""
    ended = [place for place, message in enumerate(messages) if message.status in (Status.ENDED, Status.LEFT)]
    counts = [message.count + (message.status is Status.BATCH) for message in messages]
    finding = uneven_batches(counts, ended=ended, axis=axis, step=step, members=members)
    if finding is None:
        return Outcome()
    finding = with_cause(finding, Explanation(Cause.UNEVEN_LENGTH), None)  # ranks that have left answer no more
    return Outcome((finding,), uneven=AXES if axis == "tp" else frozenset({"dp"}))


def _find_difference(peers: Peers, batch: RankBatch) -> Outcome:
    """Gather all that the ranks of the TP group know, and return what differs, where and why."""
    exchange = peers.tp
    summaries = dict(zip(exchange.ranks, exchange.all_gather_object(batch.summary()), strict=True))
    differences = leaf_differences(summaries)
    if not differences:
        return Outcome()
    located = locate(exchange, batch.contents, differences[0])
    contents = exchange.all_gather_object(_contents(batch.tensors(), differences))
    dp_ranks = peers.groups.dp
    where = {"dp_rank": dp_ranks.index(peers.groups.rank)} if len(dp_ranks) > 1 else {}
    finding = batches_agree_within_tp(differences, step=batch.step, located=located, where=where)
    explanation = explain_difference(
        [replace(summary, contents=digests) for summary, digests in zip(summaries.values(), contents, strict=True)],
        [difference.path for difference in differences],
        exchange.ranks,
    )
    return Outcome((with_cause(finding, explanation, peers.groups),))


def _contents(tensors: Mapping[str, torch.Tensor], differences: Sequence[LeafDifference]) -> dict[str, ContentDigests]:
    smallest = {difference.path: _smallest_shape(difference) for difference in differences}
    masks = {path: tensor for path, tensor in tensors.items() if path.rpartition(".")[2] == "attention_mask"}
    return content_digests({path: tensors[path] for path in smallest if path in tensors} | masks, smallest)


def _smallest_shape(difference: LeafDifference) -> tuple[int, ...]:
    """Return the smallest size of each dim on any rank; nothing where the numbers of dims differ."""
    shapes = [leaf.shape for leaf in difference.leaves.values() if leaf is not None]
    return tuple(map(min, *shapes)) if len(shapes) > 1 and len({len(shape) for shape in shapes}) == 1 else ()


def _find_equal_samples(peers: Peers, batch: RankBatch, equal_samples: EqualSamples) -> Finding | None:
    """Compare all bytes of the replicas' samples, and return a finding once they cannot be equal by chance."""
    exchange = peers.dp
    samples = exchange.all_gather_object(batch.samples())
    replicas = dict(enumerate(samples))
    same = same_samples(
        {number: each.rows for number, each in replicas.items()},
        {number: each.beside for number, each in replicas.items()},
    )
    first = samples[same[0].replicas[0]] if same else None
    if not equal_samples.are_beyond_chance(None if first is None else first.bits) or first is None:
        return None
    summaries = exchange.all_gather_object(batch.summary())
    finding = batches_differ_across_dp(same, field=first.field, step=batch.step, replicas=peers.replicas)
    explanation = explain_same_samples(
        [replace(summaries[replica], rows=samples[replica].rows) for replica in same[0].replicas]
    )
    return with_cause(finding, explanation, peers.groups)


def _gather_noticed(peers: Peers, batch: RankBatch, axes: frozenset[str]) -> Outcome:
    """Return what the ranks have noticed of their own samples; some rank has."""
    groups = peers.groups
    own: Finding | None = None
    if batch.noticed is not None and batch.memory is not None:
        own = samples_come_once(batch.noticed, ranks=groups.tp)
        own = with_cause(own, explain_once(batch.noticed, batch.memory.loader), groups)
    findings = peers.dp.all_gather_object(own) if "dp" in axes else (own,)
    outcome = Outcome(tuple(finding for finding in findings if finding is not None))
    # Ranks of one TP group have the same batches, and have noticed the same, unless one of them began later.
    return max(peers.tp.all_gather_object(outcome), key=lambda each: len(each.findings)) if "tp" in axes else outcome


def loader_failure(errors: Mapping[int, LoaderError | None], count: int) -> RankFailure:
    """Return the failure that ranks end with when the loader of another one has raised at its batch `count`.

    Args:
        errors: By rank, None for those that have not raised; empty where it is unknown which rank has.
        count: How many batches came before.
    """
    raised = {rank: error for rank, error in errors.items() if error is not None}
    if not raised:
        return RankFailure(f"the data loader of another rank raised at batch {count}", first=-1, outcomes=())
    first, error = next(iter(raised.items()))
    return RankFailure(
        f"the data loader of rank {first} raised {error.type} at batch {count}: {error.message}\n\n"
        f"rank {first}:\n{error.traceback}",
        first=first,
        outcomes=tuple(
            RankOutcome(rank, "raised", each.type, each.message, each.traceback) for rank, each in raised.items()
        ),
    )
