"""`guard`: during a run of weeks, do the replicas still agree? By digests, every so many steps."""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch
import xxhash
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tpcheck.backends.live_groups import LiveGroups, groups_of_run
from tpcheck.core.cuda import is_capturing
from tpcheck.core.digests import start_digests
from tpcheck.core.environment import package_versions
from tpcheck.core.errors import Mismatch, RankFailure, RankOutcome, UsageError
from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict, with_nodes
from tpcheck.core.module_hooks import HiddenHooks
from tpcheck.core.notices import NO_TP, say
from tpcheck.core.topology import Topology
from tpcheck.numerics.optimizer_view import OptimizerView, Part
from tpcheck.numerics.optimizers.choose import view_of
from tpcheck.numerics.optimizers.closures import Arguments, with_closure_followed
from tpcheck.numerics.optimizers.names import unwrapped, unwrapped_name
from tpcheck.numerics.recorder import eager
from tpcheck.numerics.sketch import GlobalIndex
from tpcheck.numerics.tensors import named_tensors
from tpcheck.report import words
from tpcheck.report.report import Report
from tpcheck.runs.comparing.run_findings import BATCHES, REPLICAS
from tpcheck.runs.guarding.findings import (
    BATCH,
    FINITE,
    LOSS_SCALE,
    NORM,
    OPTION,
    SKIPPED,
    STEPS,
    findings_of,
)
from tpcheck.runs.guarding.layouts import FirstOutputs
from tpcheck.runs.guarding.replica_digests import Item, Label, Vote
from tpcheck.runs.guarding.rounds import Outcome, Rounds
from tpcheck.runs.recording.passes import is_in_backward, is_repeated_call
from tpcheck.world.exchange import Exchange
from tpcheck.world.failures import is_communication

_log = logging.getLogger("tpcheck")

OnMismatch = str | Callable[[Report], None]
Log = Callable[[dict[str, float]], None]

# As long as one rank may take to save a checkpoint while the others wait at a check. A rank that dies ends it at once.
TIMEOUT = 600.0
# Options that choose how a step is computed, not what it is.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable", "initial_lr", "name"}
# Seconds in which the death of a rank reaches the others' sockets, after a collective of theirs has failed because of
# it. Both connections are closed by the kernel in the same moment.
_DEATH_SPREADS_S = 1.0


def guard(
    model: Any,
    *,
    optimizer: Any = None,
    topology: Topology | None = None,
    every: int = 100,
    on_mismatch: OnMismatch = "raise",
    log: Log | None = None,
    timeout: float = TIMEOUT,
) -> Guard:
    """Compare what several ranks hold, every so many optimizer steps, for as long as a training runs.

    Compared to the bit, by digests computed where the tensors are: parameters, buffers, optimizer state, float32
    masters and the gradients that the optimizer got, over the TP and the DP group, where ranks hold the same elements;
    the learning rate and the other options, the loss scale, the number of steps, over both; the batch over TP. Shards
    and ZeRO's partitions have no replicas and are not compared. Gradients that are not finite are named.

    Checks run inside calls of the model, so that a rank which alone skips an optimizer step makes nobody wait: the
    first at the first call, the next after the first step, then after each `every` steps. Other steps cost
    microseconds.

    Args:
        model: A module, or what wraps it: an engine, DistributedDataParallel. Every rank calls this.
        optimizer: The optimizer, or several; None for the engine's own, or whichever steps parameters of the model.
        topology: Sizes of the axes; needed unless DeepSpeed, transformers, accelerate or Megatron know them.
        every: Optimizer steps from one check to the next.
        on_mismatch: `raise` on every rank in the same call, `warn` once for each tensor, or a callable that takes the
            report, on every rank.
        log: Called on rank 0 after each check with numbers by name, for W&B, TensorBoard or MLflow; None for a line of
            `logging.getLogger("tpcheck")` at level INFO.
        timeout: Seconds that ranks wait for each other at a check. A rank that dies is reported at once.

    Returns:
        A handle with `remove()`, which is a context manager, too.

    Raises:
        UsageError: An argument is wrong, or no library knows the groups.
        Mismatch: From a call of the model: ranks differ. `report` names the tensors, the ranks, and the last step at
            which they were equal.
        RankFailure: From a call of the model: a rank has died, or does not come.

    Example:
        >>> with tpcheck.guard(model, optimizer=optimizer, every=100):  # doctest: +SKIP
        ...     for batch in loader:
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    return Guard(model, optimizer, GuardOptions(topology, every, on_mismatch, log, timeout))


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """The options of `guard`, with the same names."""

    topology: Topology | None = None
    every: int = 100
    on_mismatch: OnMismatch = "raise"
    log: Log | None = None
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise UsageError("every", self.every, "a positive integer")
        if self.on_mismatch not in ("raise", "warn") and not callable(self.on_mismatch):
            raise UsageError("on_mismatch", self.on_mismatch, "raise, warn, or a callable that takes the report")
        if self.log is not None and not callable(self.log):
            raise UsageError("log", self.log, "a callable that takes a dict of numbers, or None")
        if not isinstance(self.timeout, (int, float)) or isinstance(self.timeout, bool) or not self.timeout > 0:
            raise UsageError("timeout", self.timeout, "seconds above 0")


@dataclass(slots=True)
class Schedule:
    """At which calls of the model the checks are. All ranks of a grid make the same calls, not always the same steps.

    Attributes:
        every: Optimizer steps from one check to the next.
        next_call: Number of calls before the next check.
        calls_per_step: As seen between the last checks; None before the first step.
        steps, calls_at_step: Of the last check: optimizer steps taken, and calls before the last of them.
    """

    every: int
    next_call: int = 0
    calls_per_step: float | None = None
    steps: int = 0
    calls_at_step: int = 0

    def has_check_before_next_step(self, calls: int) -> bool:
        """Return whether the next check may come before the next step, after so many calls."""
        return self.calls_per_step is None or self.next_call - calls < self.calls_per_step

    def advance(self, calls: int, steps: int, calls_at_step: int) -> None:
        """Choose the next check. The arguments, but for `calls`, are those that the ranks have agreed on."""
        if steps > self.steps:
            self.calls_per_step = (calls_at_step - self.calls_at_step) / (steps - self.steps)
            self.steps, self.calls_at_step = steps, calls_at_step
            target = (steps // self.every + 1) * self.every
            self.next_call = max(calls + 1, calls_at_step + round((target - steps) * self.calls_per_step))
        elif self.calls_per_step is None:
            self.next_call = max(1, 2 * calls)
        else:  # every step since then was skipped
            self.next_call = calls + ceil(self.calls_per_step)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A local tensor and what it is."""

    label: Label
    values: torch.Tensor
    tp_piece: str | None
    dp_piece: str
    axes: frozenset[str]
    scale: float = 1.0


@dataclass(slots=True)
class _Gradients:
    """The gradients of one step, whose digests and norms are being computed on their device.

    Attributes:
        call: Number of calls of the model before the step.
        pending: Functions that wait for items and norms, one for each step of a torch optimizer.
    """

    call: int
    pending: list[Callable[[], tuple[list[Item], dict[Label, float]]]] = field(default_factory=list)


class Guard(AbstractContextManager["Guard"]):
    """Compares replicas every so many steps until it is removed. Made by `guard`."""

    def __init__(self, model: Any, optimizer: Any, options: GuardOptions) -> None:
        self._options = options
        self._root = unwrapped(model)
        self._name = type(self._root).__name__
        self._groups = groups_of_run(model, self._root, options.topology)
        if self._groups.rank == 0 and self._groups.notice is not None:
            NO_TP.say(self._groups.notice)
        self._view: OptimizerView = view_of(model, optimizer, groups=self._groups)
        self._rounds = Rounds(self._groups, timeout=options.timeout)
        self._schedule = Schedule(options.every)
        self._calls = 0
        self._steps = 0
        self._calls_at_step = 0
        self._has_stepped = False
        self._gradients: _Gradients | None = None
        self._pieces: dict[tuple[str, Any, Any], str] = {}
        self._right_at: dict[Label, int] = {}
        self._warned: set[Label] = set()
        self._num_checks = 0
        self._num_compared = 0
        self._num_findings = 0
        self._has_told_coverage = False
        self._has_told_of_log = False
        self._first_outputs: FirstOutputs | None = None
        self._experts = frozenset(
            unwrapped_name(name)
            for name, parameter in self._root.named_parameters()
            if getattr(parameter, "allreduce", True) is False  # how Megatron and DeepSpeed mark parameters of experts
        )
        # These divide by statistics over a whole dim, so their weights are not cut.
        self._norms = frozenset(
            unwrapped_name(f"{path}.{name}" if path else name)
            for path, module in self._root.named_modules()
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm))
            for name, _ in module.named_parameters(recurse=False)
        )
        self._not_compared: dict[str, str] = dict.fromkeys(self._experts, "experts differ from rank to rank")
        before_call = self._root.register_forward_pre_hook(eager(self._before_call), with_kwargs=True, prepend=True)
        self._handles: list[Any] = [
            HiddenHooks([(self._root, before_call)]),
            register_optimizer_step_pre_hook(self._before_optimizer),
            register_optimizer_step_post_hook(self._after_optimizer),
        ]

    def remove(self) -> None:
        """Remove the hooks. Ranks that go on find at their next check that this one has left."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        if self._first_outputs is not None:
            self._first_outputs.remove()
        self._gradients = None
        if handles and self._groups.rank == 0 and not self._num_findings:
            say(self._conclusion())

    def _conclusion(self) -> str:
        """Return `guard: 120 tensors of rank 0 compared at 12 checks; no difference`."""
        also = f"; {self._groups.not_compared}" if self._groups.not_compared else ""
        if max(len(self._groups.tp), len(self._groups.dp)) == 1:
            steps = words.pluralize(self._num_checks, "step")
            return f"guard: looked at {steps}; no replicas to compare{also}, all finite"
        checks = words.pluralize(self._num_checks, "check")
        if not self._num_compared:
            return f"guard: no tensor of rank 0 is known to be on another rank; nothing was compared at {checks}"
        tensors = words.pluralize(self._num_compared, "tensor")
        return f"guard: {tensors} of rank 0 compared at {checks}{also}; no difference"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
        if isinstance(error, Exception) and not isinstance(error, (Mismatch, RankFailure)):
            self._raise_if_rank_is_gone(error)
            self._abort(error)

    # ---- hooks

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._handles or module is not self._root or not torch.is_grad_enabled():  # a copy may have the hook
            return
        if is_in_backward() or is_repeated_call() or is_capturing():
            return
        if self._has_stepped:
            self._has_stepped = False
            self._steps += 1
            self._calls_at_step = self._calls
        if self._first_outputs is not None:
            self._first_outputs.remove()
        if self._calls >= self._schedule.next_call:
            self._check(args, kwargs)
        if self._calls == 0:
            self._see_first_outputs()
        self._calls += 1

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Arguments | None:
        if not self._view.owns(optimizer) or is_capturing():
            return None
        given = with_closure_followed(args, kwargs, partial(self._see_gradients, optimizer))
        if given is None:
            self._see_gradients(optimizer)
        return given

    def _see_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Start the digests of what the optimizer gets, if a check may come before its next step."""
        if not self._schedule.has_check_before_next_step(self._calls):
            return
        if self._gradients is None or self._gradients.call != self._calls:
            self._gradients = _Gradients(self._calls)
        self._gradients.pending.append(self._start(self._placed(self._view.gradients(optimizer)), with_norms=True))

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._has_stepped and self._view.owns(optimizer) and not is_capturing():
            self._has_stepped = True

    # ---- a check

    def _check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        try:
            with torch.no_grad():
                items, votes, squares = self._everything(args, kwargs)
        except Exception as error:
            self._abort(error)
            raise
        outcome = self._rounds.agree(
            items,
            votes,
            squares,
            steps=self._steps,
            calls_at_step=self._calls_at_step,
            right_at=self._right_at,
        )
        self._schedule.advance(self._calls, outcome.steps, outcome.calls_at_step)
        self._gradients = None
        wrong = {difference.label for difference in outcome.differences}
        self._num_checks += 1
        self._num_compared = max(self._num_compared, outcome.num_tensors)
        self._num_findings += len(wrong) + len(outcome.not_finite)
        self._right_at |= {item.label: outcome.steps for item in items if item.label not in wrong}
        self._not_compared |= {**outcome.not_compared, **self._view.not_viewed()}
        self._write_log(outcome, time.perf_counter() - began, is_right=not (wrong or outcome.not_finite))
        if wrong or outcome.not_finite:
            self._report(outcome, {*wrong, *(("gradient", each.name, "") for each in outcome.not_finite)})

    def _everything(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[Item], dict[str, Vote], dict[Label, float]]:
        """Return all that peers may hold, too, in the order of the model; votes; sums of squares of gradients."""
        tensors = [*self._placed(self._view.weights()), *self._buffers(), *self._placed(self._view.states())]
        finish = [self._start(tensors), self._start(self._leaves(args, kwargs))]
        squares: dict[Label, float] = {}
        items: list[Item] = list(self._numbers())
        if self._gradients is not None:
            finish += self._gradients.pending
        for wait in finish:
            found, of_gradients = wait()
            items += found
            squares |= of_gradients
        if self._gradients is not None and self._gradients.call != self._calls:
            # Some calls ago: a rank that has skipped a step has gradients of another step, which no peer holds.
            age = f" of {self._calls - self._gradients.call} calls ago"
            items = [replace(item, dp_piece=item.dp_piece + age, tp_piece=item.tp_piece and item.tp_piece + age)
                     if item.label[0] == "gradient" else item for item in items]  # fmt: skip
        return items, self._votes(tensors, {item.label: item.digest for item in items}), squares

    def _see_first_outputs(self) -> None:
        """Look at what modules with vectors of unknown layout and equal elements return in the call that begins."""
        undecided = self._rounds.undecided()
        if undecided:
            self._first_outputs = FirstOutputs(self._root, undecided)

    def _placed(self, parts: Iterable[Part]) -> Iterator[_Tensor]:
        for part in parts:
            if part.name in self._experts:
                continue
            if not _is_strided(part.values):
                self._not_compared[part.name] = f"its values are {type(part.values).__name__}"
                continue
            piece = self._piece(part.name, part.index)
            in_shard = self._piece(part.name, part.index_in_shard, "shard")
            axes = frozenset({"dp"}) if part.is_term else frozenset({"tp", "dp"})
            label = (part.kind, part.name, part.state)
            yield _Tensor(label, part.values, piece, piece or in_shard or "local", axes, part.scale)

    def _buffers(self) -> Iterator[_Tensor]:
        """Yield the buffers. DP replicas have running statistics of different samples."""
        for name, buffer in self._root.named_buffers():
            values: torch.Tensor = buffer.to_local() if hasattr(buffer, "to_local") else buffer
            if _is_strided(values):
                yield _Tensor(("buffer", unwrapped_name(name), ""), values, None, "local", frozenset({"tp"}))

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[_Tensor]:
        """Yield what the model is called with, by the names of its arguments."""
        positional = [
            parameter.name
            for parameter in inspect.signature(self._root.forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        named = {
            **{positional[place] if place < len(positional) else str(place): value for place, value in enumerate(args)},
            **kwargs,
        }
        for path, values in named_tensors(named):
            if _is_strided(values) and not hasattr(values, "placements"):
                yield _Tensor((BATCH, path, ""), values, "", "", frozenset({"tp"}))

    def _numbers(self) -> Iterator[Item]:
        yield Item.number(STEPS, "", self._steps)
        yield Item.number(SKIPPED, "", self._view.num_skipped())
        yield Item.number(LOSS_SCALE, "", self._view.loss_scale())
        norm = self._view.reported_norm()
        if norm is not None and _clips(self._view):
            yield Item.number(NORM, "", norm)
        for number, group in enumerate(self._view.groups()):
            for name, value in group.options.items():
                if name not in _IMPLEMENTATION:
                    yield Item.number(OPTION, name, value, str(number))

    def _start(
        self, tensors: Iterable[_Tensor], *, with_norms: bool = False
    ) -> Callable[[], tuple[list[Item], dict[Label, float]]]:
        """Start digests, and norms of gradients; return a function that waits for them and keeps no tensor alive."""
        given = list(tensors)
        wait = start_digests([tensor.values for tensor in given])
        heads = [f"{tensor.values.dtype} {tuple(tensor.values.shape)}".encode() for tensor in given]
        places = [(tensor.label, tensor.tp_piece, tensor.dp_piece, tensor.axes) for tensor in given]
        scales = {tensor.label: tensor.scale for tensor in given}
        norms = {
            tensor.label: torch.linalg.vector_norm(tensor.values, dtype=torch.float64)
            for tensor in (given if with_norms else ())
            if tensor.values.is_floating_point()
        }
        del given

        def finish() -> tuple[list[Item], dict[Label, float]]:
            items = [
                Item(label, xxhash.xxh3_128_digest(head + bits), "", tp_piece, dp_piece, axes)
                for (label, tp_piece, dp_piece, axes), head, bits in zip(places, heads, wait(), strict=True)
            ]
            values = _to_host(list(norms.values()))
            return items, {
                label: (norm * scales[label]) ** 2 for label, norm in zip(norms, values, strict=True)
            }  # fmt: skip

        return finish

    def _votes(self, tensors: Sequence[_Tensor], digests: Mapping[Label, bytes]) -> dict[str, Vote]:
        """Return what this rank says of parameters and buffers whose layout over TP is unknown."""
        if len(self._groups.tp) == 1:
            return {}
        votes = {}
        for tensor in tensors:
            kind, name, _ = tensor.label
            if tensor.tp_piece is None and kind in ("weight", "buffer"):
                known = self._rounds.is_replica(name)
                is_constant = known is None and _is_constant(tensor.values)
                seen = None if self._first_outputs is None else self._first_outputs.seen.get(name)
                is_norm = name in self._norms or (seen is not None and seen.is_norm)
                is_whole = kind == "weight" and (tensor.values.dim() == 0 or is_norm)
                votes[name] = Vote(digests[tensor.label], is_constant, is_whole, seen.digest if seen else "")
        return votes

    def _piece(self, name: str, index: GlobalIndex | None, within: str = "") -> str | None:
        """Return the piece of an index. That of a fragment, a new one at each check, is kept: it takes time."""
        if index is None:
            return None
        if index.fragment is None:
            return within + index.piece()
        key = (name, index.fragment, within)
        if key not in self._pieces:
            self._pieces[key] = within + index.piece()
        return self._pieces[key]

    # ---- what comes of it

    def _write_log(self, outcome: Outcome, seconds: float, *, is_right: bool) -> None:
        if self._groups.rank != 0:
            return
        if outcome.steps and not self._has_told_coverage:
            self._has_told_coverage = True
            _log.info("%s", coverage_line(outcome, self._not_compared))
        reported = self._view.reported_norm() if self._steps else None
        is_stage = len(self._groups.pp) > 1  # its gradients are not all
        norm = reported if reported is not None or is_stage else outcome.norm
        rates = [group.options["lr"] for group in self._view.groups() if "lr" in group.options]
        if self._options.log is not None:
            numbers: dict[str, float] = {
                "step": outcome.steps,
                "replicas_agree": float(is_right),
                "tensors_compared": outcome.num_tensors,
                "loss_scale": self._view.loss_scale(),
                "skipped_steps": self._view.num_skipped(),
                "seconds": seconds,
            }
            numbers |= {} if norm is None else {"gradient_norm": norm}
            numbers |= {} if not rates else {"learning_rate": float(rates[0])}
            self._call_log(numbers)
            return
        if is_right:
            _log.info("%s", log_line(outcome, self._groups, norm, self._view.loss_scale(), rates))

    def _call_log(self, numbers: dict[str, float]) -> None:
        """Call what the user gave as `log`: where it raises, rank 0 alone would leave the loop while others wait."""
        assert self._options.log is not None
        try:
            self._options.log(numbers)
        except Exception as error:
            if self._has_told_of_log:
                return
            self._has_told_of_log = True
            what = f"{type(error).__name__}: {error}".strip().rstrip(":")
            text = f"the log= callable of tpcheck.guard raised {what}. The guard goes on, and says so once"
            try:
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            except Warning:  # where warnings are errors
                _log.warning("%s", text)

    def _report(self, outcome: Outcome, labels: set[Label]) -> None:
        node_of = self._rounds.node_of
        found = findings_of(outcome.differences, outcome.not_finite, outcome.steps)
        findings = tuple(with_nodes(finding, node_of) for finding in found)
        report = self._report_of(findings, outcome)
        mode = self._options.on_mismatch
        printing_rank = min((rank for finding in findings for rank in finding.where.get("ranks", ())), default=0)
        is_printed_here = self._groups.rank == printing_rank
        text = report.to_text() if is_printed_here else report.to_line(printed_on=printing_rank)
        if callable(mode):
            mode(report)
        elif mode == "raise":
            self.remove()
            raise Mismatch(text, report)
        elif not labels <= self._warned:
            self._warned |= labels
            warnings.warn(text, stacklevel=2)

    def _report_of(self, findings: tuple[Finding, ...], outcome: Outcome) -> Report:
        topology = self._groups.topology
        subject = {"model": self._name, "tp": topology.tp, "dp": topology.dp, "steps": outcome.steps}
        compared = {REPLICAS: outcome.num_tensors, BATCHES: 1, FINITE: len(outcome.not_finite)}
        checks = dict.fromkeys([REPLICAS, *(finding.check for finding in findings)])
        return Report(
            Verdict(
                "failed",
                subject,
                package_versions(),
                findings,
                tuple(CheckResult(check, compared[check], 0.0) for check in checks),
                Coverage(outcome.num_tensors, outcome.num_tensors + len(self._not_compared), dict(self._not_compared)),
            )
        )

    def _raise_if_rank_is_gone(self, error: Exception) -> None:
        """Raise the failure of the rank that made a collective of this one fail: it has died, or is suspended."""
        exchanges = self._rounds.exchanges.values()
        deadline = time.monotonic() + _DEATH_SPREADS_S
        while isinstance(error, RuntimeError):
            for exchange in exchanges:
                exchange.raise_if_aborted()
                if lost := exchange.lost_ranks():
                    self._fail_for(lost, exchange, "died", error)
                if is_communication(error) and (suspended := exchange.suspended_ranks()):
                    self._fail_for(suspended, exchange, "hung", error)
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)

    def _fail_for(
        self, ranks: Sequence[int], exchange: Exchange, state: Literal["died", "hung"], error: Exception
    ) -> NoReturn:
        """Raise, on all ranks that come to their next check, that these ranks made this one fail."""
        how = "died" if state == "died" else f"{'is' if len(ranks) == 1 else 'are'} suspended"
        failure = RankFailure(
            f"{exchange.named(ranks)} of {exchange.name} {how}, which made this rank fail with: {error}",
            first=ranks[0],
            outcomes=tuple(RankOutcome(rank, state) for rank in ranks),
        )
        self._abort(failure)
        raise failure from error

    def _abort(self, error: Exception) -> None:
        """Make the ranks that wait for this one at their next check raise."""
        if not isinstance(error, RankFailure):
            what = f"{type(error).__name__}: {error}"
            error = RankFailure(
                f"rank {self._groups.rank} raised {what}",
                first=self._groups.rank,
                outcomes=(RankOutcome(self._groups.rank, "raised", type(error).__qualname__, str(error)),),
            )
        for exchange in self._rounds.exchanges.values():
            exchange.abort(error)


def log_line(
    outcome: Outcome, groups: LiveGroups, norm: float | None, loss_scale: float, rates: Sequence[Any]
) -> str:  # fmt: skip
    """Return the line of a check without findings."""
    ranks = [(axis, of_axis) for axis, of_axis in (("TP", groups.tp), ("DP", groups.dp)) if len(of_axis) > 1]
    named = " and ".join(f"{axis} group ({', '.join(map(str, of_axis))})" for axis, of_axis in ranks)
    compared = f"{outcome.num_tensors} tensors agree in {named}" if named else "this rank has no replicas"
    numbers = [
        *([] if norm is None else [f"gradient norm {norm:.6g}"]),
        f"loss scale {loss_scale:g}",
        *([f"lr {', '.join(dict.fromkeys(f'{float(rate):g}' for rate in rates))}"] if rates else []),
    ]
    return f"step {outcome.steps}: {compared}; {', '.join(numbers)}"


def coverage_line(outcome: Outcome, not_compared: Mapping[str, str]) -> str:
    """Return the line that says once what is compared and what is not."""
    names: dict[str, list[str]] = {}
    for name, reason in not_compared.items():
        names.setdefault(reason, []).append(name)
    parts = [
        f"{outcome.num_tensors} tensors of this rank are compared",
        f"{outcome.num_alone} are on no other rank (shards, partitions) or not known to be",
        *(f"{words.join_truncated(of_reason, 3)}: {reason}" for reason, of_reason in names.items()),
    ]
    return "guard: " + "; ".join(parts)


def _clips(view: OptimizerView) -> bool:
    """Return whether an engine clips by the norm that it tells; without clipping some tell the norm of one shard."""
    return bool(getattr(getattr(view, "engine_optimizer", None), "clip_grad", 0.0))


def _is_strided(values: torch.Tensor) -> bool:
    return values.layout == torch.strided and not values.is_nested and not values.is_meta and not values.is_quantized


def _is_constant(values: torch.Tensor) -> bool:
    return values.numel() == 0 or bool((values == values.reshape(-1)[0]).all())


def _to_host(norms: Sequence[torch.Tensor]) -> list[float]:
    """Copy numbers to the host, all of a device at once."""
    if not norms:
        return []
    joined: list[float] = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
    return joined
