"""One round of comparing: every rank says what it has, and all come to the same outcome."""

from __future__ import annotations

import struct
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tpcheck.backends.live_groups import LiveGroups, live_groups
from tpcheck.batches.causes import explain_batches
from tpcheck.batches.comparison import (
    FieldDifference,
    batches_agree_within_tp,
    batches_differ_across_dp,
    field_differences,
    same_samples,
    uneven_batches,
)
from tpcheck.batches.leaves import Digested, Entry, Remembered, as_tensor
from tpcheck.batches.locate import locate
from tpcheck.batches.records import BatchFacts
from tpcheck.batches.samples import contents, sampled_rows, samples_of
from tpcheck.core.causes import Cause
from tpcheck.core.errors import RankFailure, RankOutcome
from tpcheck.core.findings import Finding
from tpcheck.core.topology import Topology
from tpcheck.numerics.evidence import Suspect
from tpcheck.world.exchange import Exchange

_TOKEN = struct.Struct("<16s16sqB?6x")  # 48 bytes: all that is sent while nothing is wrong


class Status(IntEnum):
    """What a rank has to say in a round."""

    BATCH = 0
    ENDED = 1  # its loader has no more batches
    LEFT = 2  # its loop takes no more batches; it has not waited for this round
    FAILED = 3  # its loader has raised, or that of a rank in its TP group
    WRONG = 4  # its TP group has found something


@dataclass(frozen=True, slots=True)
class Said:
    """What one rank said.

    Attributes:
        digest: Of all leaves.
        rows: Of sampled rows, None where the batch has no rows.
        count: Batches that it has got before this round.
        status: What it has.
    """

    digest: bytes
    rows: bytes | None
    count: int
    status: Status

    @classmethod
    def read(cls, message: bytes) -> Said:
        digest, rows, count, status, has_rows = _TOKEN.unpack(message)
        return cls(digest, rows if has_rows else None, count, Status(status))


@dataclass(frozen=True, slots=True)
class Origin:
    """How a batch was made, as far as it was seen.

    Attributes:
        rng: Digests of random generators when it was asked for.
        loader: Returns what is known of the loader; asked when something is wrong.
    """

    rng: Mapping[str, str] = field(default_factory=dict)
    loader: Callable[[], Mapping[str, Any]] = dict


class Part:
    """One rank's batch at one step, its digests under way from the moment this is made."""

    def __init__(
        self,
        status: Status,
        *,
        step: int,
        count: int,
        batch: Any = None,
        origin: Origin | None = None,
        with_rows: bool = False,
        error: BaseException | None = None,
        remembered: Remembered | None = None,
    ) -> None:
        self.status, self.step, self.count = status, step, count
        self.error = None if error is None else Raised.of(error)
        self._origin = origin
        self._batch = Digested(batch, remembered) if status is Status.BATCH else None
        self._rows = sampled_rows(self.entries) if with_rows else None

    @property
    def entries(self) -> list[Entry]:
        return [] if self._batch is None else self._batch.entries

    def message(self, status: Status | None = None) -> bytes:
        """Return the constant number of bytes that travels at every step."""
        digest = b"" if self._batch is None else self._batch.token
        rows = b"" if self._rows is None else self._rows()
        status = self.status if status is None else status
        return _TOKEN.pack(digest, rows, self.count, status, rows != b"")

    def facts(self) -> BatchFacts:
        """Return what travels when something is wrong."""
        return BatchFacts(
            self.step,
            ended=self.status in (Status.ENDED, Status.LEFT),
            leaves=() if self._batch is None else self._batch.leaves,
            rng={} if self._origin is None else dict(self._origin.rng),
            loader={} if self._origin is None else self._origin.loader(),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by path, and the arrays whose dtype torch has."""
        found = {entry.path: as_tensor(entry) for entry in self.entries}
        return {path: tensor for path, tensor in found.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception as text: its class may exist on one rank alone."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        return cls(type(error).__qualname__, str(error), "".join(traceback.format_exception(error)))


# Connections are made once for as long as torch's default group lives: a loop may call `check_batch` at every step.
_peers: WeakKeyDictionary[Any, dict[Any, Peers]] = WeakKeyDictionary()
# A rank that hangs keeps its TP group waiting, and that another replica: its own group is to tell first.
_LONGER = 3.0  # seconds


@dataclass(frozen=True, slots=True)
class Peers:
    """This rank's place and the ways to its peers.

    Attributes:
        groups: Who they are, and who told.
        tp, dp: Exchange with the ranks of the TP group, and with this rank's counterparts in the other replicas.
        replicas: TP group of each of those counterparts, in their order.
    """

    groups: LiveGroups
    tp: Exchange
    dp: Exchange
    replicas: tuple[tuple[int, ...], ...]

    def abort(self, failure: Any) -> None:
        """Tell everybody who waits for this rank that it will not come."""
        self.tp.abort(failure)
        self.dp.abort(failure)


def find_peers(
    *, group: Any = None, topology: Topology | None = None, model: Any = None, timeout: float, shared: bool = True
) -> Peers:
    """Return the peers that `live_groups` finds. The first time, collective over them.

    Args:
        timeout: Seconds that ranks wait for each other.
        shared: Use the connections of others; what compares in a thread of its own must not.

    Raises:
        UsageError: There are none; see `live_groups`.
        RankFailure: One of them does not come.
    """
    from torch import distributed as dist

    groups = live_groups(group=group, topology=topology, model=model)
    known = _peers.setdefault(dist.group.WORLD, {})
    key = (groups.tp, groups.dp, timeout)
    kept = known.get(key) if shared else None
    if kept is None or kept.tp.broken or kept.dp.broken:
        tp = Exchange(groups.tp, axis="tp", timeout=timeout)
        dp = Exchange(groups.dp, axis="dp", timeout=timeout + _LONGER)
        tp.also_aborted_by, dp.also_aborted_by = (dp,), (tp,)
        kept = Peers(groups, tp, dp, dp.all_gather_object(groups.tp))
        if shared:
            known[key] = kept
    return replace(kept, groups=groups)


# Batches that replicas have in common count once they could not well be so by chance: small labels often are.
_ENOUGH_BITS = 40.0  # one in 10^12


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to; the same on every rank.

    Attributes:
        findings: What is wrong.
        failure: A rank's loader raised.
        uneven: Axes over which ranks have not the same number of batches: they go on apart for this epoch.
    """

    findings: tuple[Finding, ...] = ()
    failure: RankFailure | None = None
    uneven: frozenset[str] = frozenset()


NOTHING = Outcome()


@dataclass
class Coincidence:
    """How long replicas have had the same samples, over the rounds so far."""

    bits: float = 0.0
    rows: tuple[bytes | None, ...] = ()


def compare(peers: Peers, part: Part, *, axes: frozenset[str], coincidence: Coincidence | None) -> Outcome:
    """Return what is wrong with this round's batches, on every rank the same.

    Args:
        axes: Over which the ranks are still together: `tp`, `dp` or both.
        coincidence: Of earlier rounds; None leaves the samples of replicas uncompared.

    Raises:
        RankFailure: A rank has gone.
    """
    try:
        outcome = _within_tp(peers.tp, part, peers) if "tp" in axes else NOTHING
        return _across_dp(peers, part, outcome, coincidence) if "dp" in axes else outcome
    except RankFailure as failure:
        peers.abort(failure)
        raise


def unheard(peers: Peers, axis: str, step: int) -> Outcome:
    """Return what came of a part that this rank posted when it left its loop."""
    exchange = peers.tp if axis == "tp" else peers.dp
    messages = exchange.wait()
    if messages is None:
        return Outcome()
    return _uneven([Said.read(message) for message in messages], axis, step, peers)


def _within_tp(exchange: Exchange, part: Part, peers: Peers) -> Outcome:
    if len(exchange.ranks) == 1:
        return Outcome(failure=None if part.error is None else _loader_raised({exchange.ranks[0]: part.error}, part))
    own = part.message()
    messages = exchange.all_gather(own)
    if messages.count(own) == len(messages) and part.status is Status.BATCH:
        return NOTHING
    said = [Said.read(message) for message in messages]
    left = any(each.status is Status.LEFT for each in said)  # who has left answers no more
    if any(each.status is Status.FAILED for each in said):
        errors = {} if left else dict(zip(exchange.ranks, exchange.all_gather_object(part.error), strict=True))
        return Outcome(failure=_loader_raised(errors, part))
    uneven = _uneven(said, "tp", part.step, peers)
    if uneven.findings or part.status is not Status.BATCH or left:
        return uneven
    if len({each.digest for each in said}) == 1:
        return Outcome()
    found = _differing(exchange, part, peers)
    return Outcome(() if found is None else (found,))


def _across_dp(peers: Peers, part: Part, outcome: Outcome, coincidence: Coincidence | None) -> Outcome:
    exchange = peers.dp
    if len(exchange.ranks) == 1:
        return outcome
    status = Status.FAILED if outcome.failure else Status.WRONG if outcome.findings else part.status
    own = part.message(status)
    said = [Said.read(message) for message in exchange.all_gather(own)]
    statuses = {each.status for each in said}
    if statuses == {Status.BATCH}:
        if coincidence is None:
            return outcome
        found = _duplicated(peers, part, tuple(each.rows for each in said), coincidence)
        if found is None:
            return outcome
        result = Outcome((found,))
    elif statuses & {Status.FAILED, Status.WRONG} and Status.LEFT not in statuses:
        result = _merged(exchange.all_gather_object(outcome))
    elif outcome.failure or outcome.findings:
        return outcome  # a rank of this TP group has left: it answers no more
    else:
        result = _uneven(said, "dp", part.step, peers)
        if not result.findings:
            return result
    if outcome.failure or outcome.findings:
        return result
    # Every DP group sees a part of what is wrong, so the ranks of each TP group have all come here.
    return _weightiest(peers.tp.all_gather_object(result))


def _weightiest(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome that says most: a failure, then a finding inside a TP group, then one between replicas."""

    def weight(outcome: Outcome) -> tuple[bool, bool]:
        within = any(finding.check == "batches_agree_within_tp" for finding in outcome.findings)
        return outcome.failure is not None, within

    return max(outcomes, key=weight)


def _merged(outcomes: Sequence[Outcome]) -> Outcome:
    """Return one outcome for all replicas."""
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    return Outcome(
        tuple(finding for outcome in outcomes for finding in outcome.findings),
        failures[0] if failures else None,
        frozenset({"tp", "dp"}) if any(outcome.uneven for outcome in outcomes) else frozenset(),
    )


def _uneven(said: Sequence[Said], axis: str, step: int, peers: Peers) -> Outcome:
    over = [place for place, each in enumerate(said) if each.status in (Status.ENDED, Status.LEFT)]
    members = [(rank,) for rank in peers.groups.tp] if axis == "tp" else peers.replicas
    counts = [each.count + (each.status is Status.BATCH) for each in said]
    suspect = uneven_batches(counts, ended=over, axis=axis, step=step, members=members)
    if suspect is None:
        return Outcome()
    finding = _finding(suspect, Cause.UNEVEN_LENGTH, more={"advice": Cause.UNEVEN_LENGTH.advise()})
    return Outcome((finding,), uneven=frozenset({"tp", "dp"} if axis == "tp" else {"dp"}))


def _differing(exchange: Exchange, part: Part, peers: Peers) -> Finding | None:
    """Ask every rank of the TP group for all that it knows, and tell what differs, where and why."""
    facts = dict(zip(exchange.ranks, exchange.all_gather_object(part.facts()), strict=True))
    differences = field_differences(facts)
    if not differences:
        return None
    located = locate(exchange, part.entries, differences[0])
    held = exchange.all_gather_object(_contents(part, differences))
    for rank, inside in zip(exchange.ranks, held, strict=True):
        facts[rank] = replace(facts[rank], loader={**facts[rank].loader, "contents": inside})
    dp_ranks = peers.groups.dp
    where = {"dp_rank": dp_ranks.index(peers.groups.rank)} if len(dp_ranks) > 1 else {}
    suspect = batches_agree_within_tp(differences, step=part.step, located=located, where=where)
    assert suspect is not None
    return _explained(suspect, facts, "tp", peers, [difference.path for difference in differences])


def _contents(part: Part, differences: Sequence[FieldDifference]) -> dict[str, dict[str, str]]:
    tensors = part.tensors()
    shortest = {difference.path: _shortest(difference) for difference in differences}
    masks = {path: tensor for path, tensor in tensors.items() if path.rpartition(".")[2] == "attention_mask"}
    return contents({path: tensors[path] for path in shortest if path in tensors} | masks, shortest)


def _shortest(difference: FieldDifference) -> tuple[int, ...]:
    """Return the smallest size of each dim on any rank; nothing where they have not the same number of dims."""
    shapes = [leaf.shape for leaf in difference.leaves.values() if leaf is not None]
    return tuple(map(min, *shapes)) if len(shapes) > 1 and len({len(shape) for shape in shapes}) == 1 else ()


def _duplicated(peers: Peers, part: Part, rows: tuple[bytes | None, ...], coincidence: Coincidence) -> Finding | None:
    """Look closer where sampled rows are the same: all rows, and how much they can tell together with earlier steps."""
    told = [each for each in rows if each is not None]
    before, coincidence.rows = coincidence.rows, rows
    if len(set(told)) == len(told):
        coincidence.bits = 0.0
        return None
    exchange = peers.dp
    held = exchange.all_gather_object(samples_of(part.entries))
    found = same_samples(dict(enumerate(samples.rows for samples in held)))
    if not found:
        coincidence.bits = 0.0
        return None
    if rows != before:  # a batch that is the same at every step tells nothing new
        coincidence.bits += held[found[0].replicas[0]].bits
    if coincidence.bits < _ENOUGH_BITS:
        return None
    told_by = exchange.all_gather_object(part.facts())
    facts = {
        peers.replicas[number][0]: replace(told_by[number], rows=held[number].rows) for number in found[0].replicas
    }
    telling = held[found[0].replicas[0]].field
    suspect = batches_differ_across_dp(found, field=telling, step=part.step, replicas=peers.replicas)
    assert suspect is not None
    return _explained(suspect, facts, "dp", peers, [], fallback=Cause.DUPLICATE_DP_BATCH)


def _explained(
    suspect: Suspect,
    facts: Mapping[int, BatchFacts],
    axis: str,
    peers: Peers,
    differing: Sequence[str],
    *,
    fallback: Cause | None = None,
) -> Finding:
    found = explain_batches(list(facts.values()), axis, peers.groups.topology, list(facts), differing)
    if found is None:
        return _finding(suspect, fallback)
    advice = found.cause.advise(found.evidence, peers.groups.topology)
    return _finding(suspect, found.cause, more={**found.evidence, "advice": advice})


def _finding(suspect: Suspect, cause: Cause | None, more: Mapping[str, Any] | None = None) -> Finding:
    evidence = {**suspect.evidence, **(more or {})}
    return Finding(
        suspect.check, suspect.where, suspect.observed, suspect.allowed, cause.slug if cause else None, evidence
    )


def _loader_raised(errors: Mapping[int, Raised | None], part: Part) -> RankFailure:
    """Return the failure that the other ranks end with."""
    raised = {rank: error for rank, error in errors.items() if error is not None}
    if not raised:
        return RankFailure(f"the data loader of another rank raised at batch {part.count}", first=-1, outcomes=())
    first, error = next(iter(raised.items()))
    return RankFailure(
        f"the data loader of rank {first} raised {error.type} at batch {part.count}: {error.message}\n\n"
        f"rank {first}:\n{error.traceback}",
        first=first,
        outcomes=tuple(
            RankOutcome(rank, "raised", each.type, each.message, each.traceback) for rank, each in raised.items()
        ),
    )
