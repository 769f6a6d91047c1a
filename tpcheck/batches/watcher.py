"""Follows the batches of one loop, and does with what it finds what the user asked for."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from tpcheck.batches.leaves import Remembered
from tpcheck.batches.rounds import (
    NOTHING,
    Coincidence,
    Origin,
    Outcome,
    Part,
    Peers,
    Status,
    compare,
    find_peers,
    unheard,
)
from tpcheck.batches.settings import OnMismatch, Settings
from tpcheck.core.environment import package_versions
from tpcheck.core.errors import BatchMismatch, Mismatch, RankFailure, UnevenBatches
from tpcheck.core.findings import CheckResult, Finding, Verdict
from tpcheck.report.report import Report

_BOTH = frozenset({"tp", "dp"})
_log = logging.getLogger("tpcheck")


@dataclass
class _Epoch:
    """Where this rank stands in one pass over its batches."""

    count: int = 0
    axes: frozenset[str] = _BOTH
    over: bool = False


class Watcher:
    """Call `start`, then `check` for each batch, then one of `end`, `failed` and `leave`. Collective over the ranks.

    A loop that has no end of its own (a hook on a model) calls `check` alone.

    Args:
        settings: What to do when, and with what is found.
        model: The model that the batches are for, where it is at hand: it may know its groups.
        name: What is watched, for reports.
    """

    def __init__(self, settings: Settings, *, model: Any = None, name: str = "batches") -> None:
        self.settings = settings
        self._model = model
        self._name = name
        self._peers: Peers | None = None
        self._epoch = _Epoch()
        self._step = 0  # batches before this one, over all epochs
        self._coincidence = Coincidence()
        self._warned: set[tuple[str, str]] = set()
        self._running: Future[Outcome] | None = None
        self._owed: Mismatch | None = None
        self._remembered = Remembered()
        self._compares_samples = settings.across_dp != "ignore"

    @property
    def peers(self) -> Peers:
        """The ranks that are compared with; found at first use."""
        if self._peers is None:
            chosen = self.settings
            self._peers = find_peers(
                group=chosen.group,
                topology=chosen.topology,
                model=self._model,
                timeout=chosen.timeout,
                shared=not chosen.overlap,
            )
            _log.info("tpcheck compares batches: %s", self.source)
        return self._peers

    @property
    def source(self) -> str:
        """Which groups are used, and who told them."""
        peers = self.peers
        return f"{peers.tp.name}, {peers.dp.name}, from {peers.groups.source}"

    def start(self) -> None:
        """Begin a pass over the batches.

        Raises:
            Mismatch: Found when the pass before had been left.
        """
        self.settle()
        owed, self._owed = self._owed, None
        if owed is not None:
            raise owed
        for axis in ("tp", "dp"):
            self._act(unheard(self.peers, axis, self._step))
        self._epoch = _Epoch()

    def check(self, batch: Any, origin: Origin | None = None) -> None:
        """Compare this rank's batch with those of its peers.

        Raises:
            BatchMismatch: They differ, and `on_mismatch` says so.
            UnevenBatches: Another rank has no more batches.
            RankFailure: Another rank's loader raised, or a rank has gone.
        """
        epoch, step = self._epoch, self._step
        self.settle()
        if step % self.settings.every == 0 and epoch.axes and not epoch.over:
            part = Part(
                Status.BATCH,
                step=step,
                count=epoch.count,
                batch=batch,
                origin=origin,
                with_rows=self._compares_samples and "dp" in epoch.axes and len(self.peers.dp.ranks) > 1,
                remembered=self._remembered,
            )
            self._round(part, overlap=self.settings.overlap)
        epoch.count += 1
        self._step += 1

    def end(self) -> None:
        """Say that this rank has no more batches, and hear whether the others have none either."""
        self._last(Status.ENDED)

    def failed(self, error: BaseException) -> None:
        """Say that this rank's loader raised; the caller raises the error itself."""
        try:
            self._last(Status.FAILED, error)
        except RankFailure:
            _log.debug("another rank failed, too", exc_info=True)

    def leave(self) -> None:
        """Say that this rank takes no more batches, without waiting for anybody."""
        epoch = self._epoch
        if epoch.over or self._peers is None or self._peers.tp.broken or self._peers.dp.broken:
            return
        epoch.over = True
        try:
            self.settle()
            message = Part(Status.LEFT, step=self._step, count=epoch.count).message()
            for axis, exchange in (("tp", self._peers.tp), ("dp", self._peers.dp)):
                if axis in epoch.axes:
                    exchange.isend(message)
        except RankFailure:
            _log.debug("another rank failed, too", exc_info=True)

    def abandon(self) -> None:
        """Leave where nothing can be raised, as at a `break`: warn of what is found; the next `start` raises it."""
        try:
            self.leave()
        except Mismatch as mismatch:
            self._owed = mismatch
            warnings.warn(str(mismatch), stacklevel=2)

    def settle(self) -> None:
        """Wait for the round that runs beside the step, and do with its outcome what the user asked for."""
        running, self._running = self._running, None
        if running is not None:
            self._act(self._waited(running.result))

    def _last(self, status: Status, error: BaseException | None = None) -> None:
        epoch = self._epoch
        self.settle()
        if not epoch.over and epoch.axes:
            epoch.over = True
            self._round(Part(status, step=self._step, count=epoch.count, error=error), overlap=False)

    def _round(self, part: Part, *, overlap: bool) -> None:
        peers, axes = self.peers, self._epoch.axes
        coincidence = self._coincidence if self._compares_samples else None
        run = partial(compare, peers, part, axes=axes, coincidence=coincidence)
        if overlap:
            self._running = _in_background(run)
        else:
            self._act(self._waited(run))

    def _waited(self, run: Callable[[], Outcome]) -> Outcome:
        try:
            return run()
        except RankFailure:
            self._epoch.over = True
            raise

    def _act(self, outcome: Outcome) -> None:
        if outcome == NOTHING:
            return
        epoch = self._epoch
        epoch.axes -= outcome.uneven
        if outcome.failure is not None:
            epoch.over = True
            raise outcome.failure
        within = [finding for finding in outcome.findings if finding.check == "batches_agree_within_tp"]
        across = [finding for finding in outcome.findings if finding.check != "batches_agree_within_tp"]
        for findings, mode in ((within, self.settings.on_mismatch), (across, self.settings.across_dp)):
            if findings and mode != "ignore":
                self._tell(findings, mode)

    def _tell(self, findings: list[Finding], mode: OnMismatch) -> None:
        report = report_of(findings, self.peers, name=self._name)
        if mode == "raise":
            self._epoch.over = True
            uneven = findings[0].evidence.get("differs") == "length"
            raise (UnevenBatches if uneven else BatchMismatch)(report.to_text(), report)
        if callable(mode):
            mode(report)
            return
        places = {(finding.check, str(finding.where.get("field"))) for finding in findings}
        if not places <= self._warned:
            self._warned |= places
            if any(check == "batches_differ_across_dp" for check, _ in places):
                self._compares_samples = False
            warnings.warn(report.to_text(), stacklevel=2)


def report_of(findings: list[Finding] | tuple[Finding, ...], peers: Peers, *, name: str) -> Report:
    """Return a report on batches, the same on every rank."""
    topology = peers.groups.topology
    subject: Mapping[str, Any] = {
        "model": name,
        "tp": topology.tp,
        "dp": topology.dp,
        "groups_from": peers.groups.source,
    }
    checks = tuple(CheckResult(check, 1, 0.0) for check in dict.fromkeys(finding.check for finding in findings))
    return Report(Verdict("failed" if findings else "passed", subject, package_versions(), tuple(findings), checks))


def _in_background(run: Callable[[], Outcome]) -> Future[Outcome]:
    """Run it in a thread that no process waits for at its end."""
    future: Future[Outcome] = Future()

    def target() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, name="tpcheck-batches", daemon=True).start()
    return future
