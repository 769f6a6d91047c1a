"""Compares the batches of one loop, and does with the findings what the options say."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any
from weakref import finalize

from tpcheck.batches.options import OnMismatch, WatchOptions
from tpcheck.batches.repeats import SampleMemory
from tpcheck.batches.rounds import (
    AXES,
    EqualSamples,
    Outcome,
    Peers,
    RankBatch,
    Status,
    compare,
    find_peers,
    outcome_after_leaving,
)
from tpcheck.batches.sampling import BatchProvenance
from tpcheck.core.environment import package_versions
from tpcheck.core.errors import BatchMismatch, Mismatch, RankFailure, UnevenBatches
from tpcheck.core.findings import CheckResult, Finding, Verdict, with_nodes
from tpcheck.core.notices import NO_TP, say
from tpcheck.report.report import Report

_log = logging.getLogger("tpcheck")
_GROUPS_SHOWN = 8
_UNREAD_SHOWN = 4


@dataclass
class _Epoch:
    """This rank's progress in one pass over its batches."""

    count: int = 0
    axes: frozenset[str] = AXES
    is_over: bool = False


class Watcher:
    """Call `start`, then `check` for each batch, then one of `end`, `fail` and `leave`. Collective over the ranks.

    A loop whose end is not seen (a hook on a model) calls `check` alone.

    Args:
        options: What to do when, and with findings.
        model: The model that the batches are for, where it is known: it may know its groups.
        name: What is watched, for reports.
        repeats_calls: As in `SampleMemory`: what is watched is calls of a model, not a loader.
    """

    def __init__(
        self, options: WatchOptions, *, model: Any = None, name: str = "batches", repeats_calls: bool = False
    ) -> None:
        self.options = options
        self._repeats_calls = repeats_calls
        self._model = model
        self._name = name
        self._peers: Peers | None = None
        self._epoch = _Epoch()
        self._step = 0  # batches before this one, over all epochs
        self._equal_samples = None if options.across_dp == "ignore" else EqualSamples()
        self._remembers = options.over_steps != "ignore"
        self._memory = self._new_memory()
        self._warned: set[tuple[str, str]] = set()
        self._background: _Background | None = None
        self._running: _Result | None = None  # of the round in the background
        self._pending_mismatch: Mismatch | None = None
        self._tally = _Tally(self._remembers, self._equal_samples is not None)
        # At the end of the process where nobody calls `conclude`: nothing shows that a loader is not iterated again.
        self._conclusion = finalize(self, _conclude, self._tally)

    @property
    def peers(self) -> Peers:
        """The ranks whose batches are compared; looked up at first use."""
        if self._peers is None:
            self._peers = find_peers(
                group=self.options.group,
                topology=self.options.topology,
                model=self._model,
                timeout=self.options.timeout,
                shared=not self.options.overlap,
            )
            groups = self._peers.groups
            _log.info("tpcheck compares batches: %s", self.source)
            self._tally.peers = self._peers
            if groups.notice is not None and groups.rank == 0:
                NO_TP.say(groups.notice)
        return self._peers

    @property
    def source(self) -> str:
        """Which groups are used, and where they come from."""
        peers = self.peers
        return f"{peers.tp.name}, {peers.dp.name}, from {peers.groups.source}"

    def conclude(self) -> None:
        """Write on rank 0 what was compared; once."""
        self._conclusion()

    def start(self) -> None:
        """Begin a pass over the batches.

        Raises:
            Mismatch: Found after the loop had left the pass before.
        """
        self.settle()
        mismatch, self._pending_mismatch = self._pending_mismatch, None
        if mismatch is not None:
            raise mismatch
        for axis in ("tp", "dp"):
            self._handle(outcome_after_leaving(self.peers, axis, self._step))
        self._epoch = _Epoch()
        self._memory = self._new_memory()

    def check(self, batch: Any, provenance: BatchProvenance | None = None) -> None:
        """Compare this rank's batch with those of its peers.

        Raises:
            BatchMismatch: They differ, and `on_mismatch` is `raise`.
            UnevenBatches: Another rank has no more batches.
            RankFailure: Another rank's loader raised, or a rank has gone.
        """
        epoch, step = self._epoch, self._step
        self.settle()
        if provenance is not None and provenance.number == 0 and epoch.count:  # an epoch that no `start` has announced
            self._memory = self._new_memory()
        if step % self.options.every == 0 and epoch.axes and not epoch.is_over:
            compares_samples = self._equal_samples is not None and "dp" in epoch.axes and len(self.peers.dp.ranks) > 1
            rank_batch = RankBatch(
                Status.BATCH,
                step=step,
                count=epoch.count,
                batch=batch,
                provenance=provenance,
                with_rows=compares_samples,
                memory=self._memory,
            )
            if not self._tally.compared:
                self._tally.unread = rank_batch.unread
            self._tally.compared += 1
            self._run_round(rank_batch, overlap=self.options.overlap)
        epoch.count += 1
        self._step += 1

    def end(self) -> None:
        """Compare, at the end of this rank's batches, whether the others have no more either."""
        self._run_last_round(Status.ENDED)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this rank's loader raised; the caller raises the error itself."""
        try:
            self._run_last_round(Status.FAILED, error)
        except RankFailure:
            _log.debug("another rank failed, too", exc_info=True)

    def leave(self) -> None:
        """Tell the other ranks that this one takes no more batches, without waiting for them."""
        epoch = self._epoch
        if epoch.is_over or self._peers is None or self._peers.tp.broken or self._peers.dp.broken:
            return
        epoch.is_over = True
        try:
            self.settle()
            message = RankBatch(Status.LEFT, step=self._step, count=epoch.count).message().pack()
            for axis in ("tp", "dp"):
                if axis in epoch.axes:
                    self._peers.exchange(axis).isend(message)
        except RankFailure:
            _log.debug("another rank failed, too", exc_info=True)

    def abandon(self) -> None:
        """Leave where nothing can be raised, as at a `break`: warn of a mismatch, which the next `start` raises."""
        try:
            self.leave()
        except Mismatch as mismatch:
            self._pending_mismatch = mismatch
            warnings.warn(str(mismatch), stacklevel=2)

    def settle(self) -> None:
        """Wait for the round that runs beside the step, and handle its outcome."""
        running, self._running = self._running, None
        if running is not None:
            self._handle(self._result(partial(_wait_for, running)))

    def _new_memory(self) -> SampleMemory | None:
        return SampleMemory(repeats_calls=self._repeats_calls) if self._remembers else None

    def _run_last_round(self, status: Status, error: BaseException | None = None) -> None:
        epoch = self._epoch
        self.settle()
        if not epoch.is_over and epoch.axes:
            epoch.is_over = True
            batch = RankBatch(status, step=self._step, count=epoch.count, memory=self._memory, error=error)
            self._run_round(batch, overlap=False)

    def _run_round(self, batch: RankBatch, *, overlap: bool) -> None:
        run = partial(compare, self.peers, batch, axes=self._epoch.axes, equal_samples=self._equal_samples)
        if overlap:
            if self._background is None:
                self._background = _Background()
            self._running = self._background.start(run)
        else:
            self._handle(self._result(run))

    def _result(self, run: Callable[[], Outcome]) -> Outcome:
        try:
            return run()
        except RankFailure:
            self._epoch.is_over = True
            raise

    def _handle(self, outcome: Outcome) -> None:
        """Raise, warn or call back, as the options say."""
        if outcome.is_clean:
            return
        epoch = self._epoch
        epoch.axes -= outcome.uneven
        if outcome.failure is not None:
            epoch.is_over = True
            raise outcome.failure
        options = self.options
        for check, mode in (
            ("batches_agree_within_tp", options.on_mismatch),
            ("batches_differ_across_dp", options.across_dp),
            ("samples_come_once", options.over_steps),
        ):
            findings = [finding for finding in outcome.findings if finding.check == check]
            if findings and mode != "ignore":
                self._report(findings, mode)

    def _report(self, findings: list[Finding], mode: OnMismatch) -> None:
        peers = self.peers
        self._tally.findings += len(findings)
        findings = [with_nodes(finding, peers.node_of) for finding in findings]
        if mode != "raise":
            findings = [_with_note_on_deepspeed(finding, peers) for finding in findings]
        report = _report_of(findings, peers, name=self._name)
        printing_rank = peers.printing_rank(findings[0])
        is_printed_here = peers.groups.rank == printing_rank
        text = report.to_text() if is_printed_here else report.to_line(printed_on=printing_rank)
        if mode == "raise":
            self._epoch.is_over = True
            uneven = findings[0].evidence.get("differs") == "length"
            raise (UnevenBatches if uneven else BatchMismatch)(text, report)
        if callable(mode):
            mode(report)
            return
        places = {(finding.check, str(finding.where.get("field"))) for finding in findings}
        if not places <= self._warned:
            self._warned |= places
            if any(check == "batches_differ_across_dp" for check, _ in places):
                self._equal_samples = None
            if any(check == "samples_come_once" for check, _ in places):
                self._remembers, self._memory = False, None
            warnings.warn(text, stacklevel=2)


@dataclass
class _Tally:
    """What a watcher has done, for its last line. It outlives the watcher.

    Attributes:
        remembers: Whether samples that come again are looked for.
        compares_replicas: Whether replicas' samples are compared.
        peers: Who was compared; None before the first batch.
        compared: How many batches were.
        findings: How many findings there were.
        unread: What in the first batch was not compared: types by path.
    """

    remembers: bool
    compares_replicas: bool
    peers: Peers | None = None
    compared: int = 0
    findings: int = 0
    unread: Mapping[str, str] = field(default_factory=dict)

    def conclusion(self) -> str:
        """Return `1,200 batches compared within TP groups (0, 1) (2, 3), from DeepSpeed; no difference`."""
        assert self.peers is not None
        groups, tp_groups = self.peers.groups, self.peers.replicas
        number = f"{self.compared:,} {'batch' if self.compared == 1 else 'batches'}"
        if len(groups.tp) > 1:
            more = len(tp_groups) - _GROUPS_SHOWN
            listed = " ".join(map(str, tp_groups[:_GROUPS_SHOWN])) + (f" and {more} more" if more > 0 else "")
            kind = "group" if len(tp_groups) == 1 else "groups"
            what, result = f"compared within TP {kind} {listed}, from {groups.library}", "no difference"
        elif len(groups.dp) > 1:
            what = f"compared across {len(groups.dp)} data-parallel replicas ({groups.library})"
            result = "no samples in common" if self.compares_replicas else "as many on each"
        else:
            what = "of a process alone; no other rank to compare with"
            result = "no samples came again" if self.remembers else "nothing was compared"
        found = {0: result, 1: "1 finding, reported above"}.get(
            self.findings, f"{self.findings} findings, reported above"
        )
        parts = (f"{number} {what}", groups.not_compared, self._not_looked_into(), found)
        return "; ".join(part for part in parts if part)

    def _not_looked_into(self) -> str:
        listed = [f"{path} ({kind})" if path else kind for path, kind in [*self.unread.items()][:_UNREAD_SHOWN]]
        more = len(self.unread) - len(listed)
        return f"not looked into: {', '.join(listed)}" + (f" and {more} more" if more else "") if listed else ""


def _conclude(tally: _Tally) -> None:
    if tally.peers is not None and tally.peers.groups.rank == 0:
        say(tally.conclusion())


def _with_note_on_deepspeed(finding: Finding, peers: Peers) -> Finding:
    """Add that DeepSpeed's own check of the first batch ends the run, where the loop is to go on.

    `DeepSpeedEngine._configure_tensor_parallel_states` puts it on the module as a hook, and keeps the handle
    (deepspeed/runtime/engine.py, 0.17 to 0.19); it removes itself after the first batch that agrees.
    """
    is_deepspeed = peers.groups.source == "deepspeed.utils.groups" and len(peers.tp.ranks) > 1
    differs = finding.check == "batches_agree_within_tp" and finding.evidence.get("differs") != "length"
    if not (is_deepspeed and differs and finding.where.get("step") == 0):
        return finding
    note = (
        "DeepSpeed compares the first batch itself, and ends the run in the forward pass (AssertionError: Data "
        "inconsistency within the TP group). To go on, call engine.first_dataloader_check.remove() before the first "
        "forward pass, on every rank."
    )
    return replace(finding, evidence={**finding.evidence, "note": note})


def _report_of(findings: Sequence[Finding], peers: Peers, *, name: str) -> Report:
    """Return a report on batches, the same on every rank."""
    topology = peers.groups.topology
    subject: Mapping[str, Any] = {
        "model": name,
        "tp": topology.tp,
        "dp": topology.dp,
        "groups_from": peers.groups.source,
    }
    checks = tuple(CheckResult(check, 1, 0.0) for check in dict.fromkeys(finding.check for finding in findings))
    return Report(Verdict("failed", subject, package_versions(), tuple(findings), checks))


_Result = SimpleQueue["Outcome | BaseException"]


class _Background:
    """Runs one round after another in a daemon thread: the process does not wait for it when it exits.

    The thread stays for all rounds: a new one is waited for until it has begun, and it has the GIL then, and begins the
    round. With 2 busy cores and 2 ranks that took 1.2 ms of the 2.7 ms that `next(loader)` did; this takes 0.1 ms.
    """

    def __init__(self) -> None:
        self._rounds: SimpleQueue[tuple[Callable[[], Outcome], _Result] | None] = SimpleQueue()
        threading.Thread(target=_run_rounds, args=(self._rounds,), name="tpcheck-batches", daemon=True).start()
        finalize(self, self._rounds.put, None)

    def start(self, run: Callable[[], Outcome]) -> _Result:
        """Return where the round's outcome, or what it raises, will be."""
        result: _Result = SimpleQueue()
        self._rounds.put((run, result))
        return result


def _run_rounds(rounds: SimpleQueue[tuple[Callable[[], Outcome], _Result] | None]) -> None:
    while (round_ := rounds.get()) is not None:
        run, result = round_
        try:
            result.put(run())
        except BaseException as error:
            result.put(error)
        del round_, run, result  # they have the batch


def _wait_for(result: _Result) -> Outcome:
    outcome = result.get()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
