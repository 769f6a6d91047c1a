"""`record`: the steps of a training loop, written as they happen."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tpcheck.backends.live_groups import groups_of_run
from tpcheck.backends.local_part import local_part
from tpcheck.core.cuda import is_capturing
from tpcheck.core.digests import digest, start_digests
from tpcheck.core.environment import package_versions
from tpcheck.core.errors import UsageError
from tpcheck.core.module_hooks import HiddenHooks
from tpcheck.core.notices import NO_TP
from tpcheck.core.topology import Topology
from tpcheck.numerics.optimizer_view import OptimizerView, ParameterGroup, Part
from tpcheck.numerics.optimizers.choose import view_of
from tpcheck.numerics.optimizers.closures import Arguments, with_closure_followed
from tpcheck.numerics.optimizers.names import unwrapped, unwrapped_name
from tpcheck.numerics.recorder import eager
from tpcheck.runs.recording.activations import Place
from tpcheck.runs.recording.options import RecordOptions, Steps
from tpcheck.runs.recording.output_places import OutputPlaces
from tpcheck.runs.recording.parameters import ParameterPlaces, StartOfRank, exchange_starts
from tpcheck.runs.recording.passes import (
    Key,
    ModuleHooks,
    Pass,
    PendingTensor,
    finished,
    generator_digests,
    is_in_backward,
    local_values,
    loss_in,
    merged,
    repeating_calls,
    replica_candidates,
    views_of,
)
from tpcheck.runs.recording.replays import Replays
from tpcheck.runs.recording.slices import ContextGroup
from tpcheck.runs.trace.files import TraceWriter, new_run_id, require_writable
from tpcheck.runs.trace.records import RankTrace, StepRecord, TensorRecord

# Parameters whose accumulated gradient is also recorded before each further micro-batch: norms and biases, on which
# reductions at the wrong time show, and which cost nothing.
MOST_ELEMENTS_ACCUMULATED = 1 << 16

# Modules that are being recorded. The replays of one recorder are calls that another one would take for the loop's.
_recorded: WeakSet[nn.Module] = WeakSet()


def record(
    model: Any,
    path: str | Path,
    *,
    optimizer: Any = None,
    topology: Topology | None = None,
    steps: Steps = None,
    modules: str | tuple[str, ...] | list[str] = "*",
    tensors: Literal["sketch", "full"] = "sketch",
    replays: int = 0,
) -> AbstractContextManager[Any]:
    """Record what a training loop computes in each step, in a few kilobytes for each tensor.

    A step is what lies between two steps of the optimizer, however many micro-batches that are. Recorded are the
    outputs of every module and their gradients, the gradients as the optimizer gets them, weights, optimizer state, the
    gradient norm and the learning rates. `tpcheck.compare_traces` then compares any two runs. The loop computes the
    same numbers with and without it.

    Args:
        model: A module, or what wraps it: an engine, DistributedDataParallel. Every rank enters the context.
        path: Folder for the trace; an older trace there is replaced.
        optimizer: The optimizer, or several; None for the engine's own, or whichever steps parameters of the model.
        topology: Sizes of the axes; needed unless DeepSpeed, transformers, accelerate or Megatron know them.
        steps: Which steps to record, counted from 0 as the context is entered, such as `range(0, 1000, 100)`, or a
            function of the number; None for all. Other steps cost nothing.
        modules: Which modules to record, such as `"model.layers.17.*"`, or several patterns.
        tensors: `"full"` keeps the tensors themselves beside their sketches.
        replays: How often each recorded step is repeated under random rounding, which measures what noise may do.
            One of two runs that are compared needs some; 2 or more are advised.

    Raises:
        UsageError: An argument is wrong, or replays are not possible with this model.

    Example:
        >>> with tpcheck.record(model, "tp2.trace", optimizer=optimizer, replays=2):  # doctest: +SKIP
        ...     for batch in loader:
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    return Recorder(model, path, RecordOptions(optimizer, topology, steps, modules, tensors, replays))


class Recorder(AbstractContextManager["Recorder"]):
    """Records the steps of a loop while inside. No rank waits for another, except on entering and in replays."""

    def __init__(self, model: Any, path: str | Path, options: RecordOptions) -> None:
        self._options = options
        self._root = unwrapped(model)
        if not any(True for _ in self._root.parameters()):
            raise UsageError("model", type(model).__name__, "a model with parameters")
        self._source = type(model).__name__
        if not any(options.has_module(unwrapped_name(name)) for name, _ in self._root.named_modules()):
            raise UsageError("modules", options.modules, f"a pattern that matches modules of {self._source}")
        self._groups = groups_of_run(model, self._root, options.topology)
        if self._groups.rank == 0 and self._groups.notice is not None:
            NO_TP.say(self._groups.notice)
        self._model = model
        require_writable(path)
        self._path = Path(path)
        self._stack = ExitStack()
        self._reset()

    def _reset(self) -> None:
        """Forget what an earlier time inside the context has left."""
        self._hooks: ModuleHooks | None = None
        self._current: Pass | None = None
        self._context: ContextGroup | None = None
        self._passes: list[Pass] = []
        self._accumulated: list[PendingTensor] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._sum_hooks: list[Any] = []
        self._gradients: dict[Key, PendingTensor] = {}
        self._has_stepped = False
        self._options_of_step: dict[tuple[str, ...], ParameterGroup] = {}
        self._states_left: dict[Key, str] = {}
        self._states_given: tuple[list[Key], Callable[[], Sequence[bytes]]] = ([], list)
        self._number = 0
        self._num_written = 0
        self._num_evaluations = 0
        self._is_recording = False
        self._is_paused = False
        self._inside = 0

    def __enter__(self) -> Recorder:
        self._reset()
        modules = [*self._root.modules()]
        if any(module in _recorded for module in modules):
            raise UsageError("model", self._source, "a model of which no other tpcheck.record records a part")
        groups = self._groups
        self._view: OptimizerView = view_of(self._model, self._options.optimizer, groups=groups)
        self._num_skipped = self._view.num_skipped()
        self._names = {
            module: unwrapped_name(name)
            for name, module in self._root.named_modules()
            if self._options.has_module(unwrapped_name(name))
        }
        weights = {part.name: part for part in self._view.weights()}
        mine = StartOfRank(
            new_run_id(),
            {name: (tuple(part.values.shape), digest(part.values.detach())) for name, part in weights.items()},
        )
        starts, together = exchange_starts(mine, groups.rank, groups.tp, groups.cp)
        self._context = ContextGroup(groups.cp, groups.rank) if len(groups.cp) > 1 else None
        self._tp_rank = groups.tp.index(groups.rank)
        self._places = ParameterPlaces(self._tp_rank, starts)
        self._outputs = OutputPlaces(weights, groups.tp, self._tp_rank, starts[0].run)
        self._replays = Replays(
            self._root, self._view, self._options.replays, self._names, together, starts[0].run, max(1, len(groups.cp))
        )
        self._writer = TraceWriter(self._path, self._header(), run_id=starts[0].run)
        _recorded.update(modules)
        self._stack.callback(_recorded.difference_update, modules)
        root, on_root = self._root, HiddenHooks()
        on_root.add(root, root.register_forward_pre_hook(eager(self._before_call), with_kwargs=True, prepend=True))
        on_root.add(root, root.register_forward_hook(eager(self._after_call), always_call=True))
        handles: list[Any] = [
            on_root,
            register_optimizer_step_pre_hook(self._before_optimizer),
            register_optimizer_step_post_hook(self._after_optimizer),
        ]
        for handle in handles:
            self._stack.callback(handle.remove)
        self._stack.callback(self._hook_modules, False)
        self._hook_modules(self._options.is_recorded(0))
        self._start_step()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                self._end_step()
                if any(each.has_backward for each in self._passes):
                    self._repeat_passes()
                    self._write_step(has_update=False)
                else:
                    self._replays.decline()
                if not (self._number or self._num_written):
                    raise UsageError("model", self._source, "a model that is called inside the context, with gradients")
                not_recorded = {**self._view.not_viewed(), **self._replays.not_measured, **self._outputs.changed()}
                self._writer.close(num_steps=self._number, not_recorded=not_recorded)

    def _header(self) -> RankTrace:
        groups = self._groups
        parameter = next(self._root.parameters())
        return RankTrace(
            rank=groups.rank,
            topology=groups.topology,
            tp_group=groups.tp,
            dp_group=groups.dp,
            dtype=str(parameter.dtype).removeprefix("torch."),
            versions=package_versions(),
            replays=self._options.replays,
            source=self._source,
            initial=self._state_tensors(is_start=True),
            steps=(),
            num_steps=0,
            world_size=dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
            cp_group=groups.cp if len(groups.cp) > 1 else (),
            node=socket.gethostname(),
        )

    # ---- calls of the model

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_paused or module is not self._root or is_in_backward() or is_capturing():
            return
        self._inside += 1
        if self._inside > 1:
            return
        if not torch.is_grad_enabled():
            self._num_evaluations += 1
            return
        self._end_step()
        if self._is_discarded():
            self._repeat_passes()
            self._write_step(has_update=False, is_skipped=True)
            self._start_step()
        if self._is_recording:
            self._record_accumulated()
            self._current = Pass.start(
                self._root, args, kwargs, len(self._groups.tp), self._tp_rank, self._outputs, self._context
            )
            self._current.before = self._replays.before_call()
            self._passes.append(self._current)

    def _after_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._is_paused or module is not self._root or is_in_backward() or not self._inside:
            return None
        self._inside -= 1
        current, self._current = self._current, self._current if self._inside else None
        if current is None or self._inside:
            return None
        current.generators_after = generator_digests()
        if self._hooks is not None:
            self._hooks.add_root_output(current, output)
        current.loss = loss_in(output)
        if not self._replays.number:
            current.args, current.kwargs = (), {}  # not to keep a batch alive
            return None
        output = views_of(output)
        self._replays.watch_seeds(current, output)
        return output

    def _is_discarded(self) -> bool:
        """Return whether gradients of earlier calls were dropped without an optimizer step: a skipped step."""
        if not any(each.has_backward for each in self._passes) or self._has_stepped:
            return False
        return self._view.num_skipped() > self._num_skipped or self._view.is_discarded()

    def _record_accumulated(self) -> None:
        number = len(self._passes)
        if not any(each.has_backward for each in self._passes):
            return
        parts = list(self._view.accumulated()) or self._accumulated_by_hooks()
        for part in parts:
            if part.values.numel() <= MOST_ELEMENTS_ACCUMULATED and self._options.has_parameter(part.name):
                self._accumulated.append(self._pending(part, kind="accumulated", part_name=str(number)))

    def _accumulated_by_hooks(self) -> list[Part]:
        """Return the sums of what came back to small parameters, where an engine takes gradients away as they come."""
        return [
            replace(part, kind="accumulated", values=self._sums[part.name])
            for part in self._view.weights()
            if part.name in self._sums and self._sums[part.name].shape == part.values.shape
        ]

    def _sum_gradient(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            if not self._is_paused and self._is_recording and not is_capturing():
                local = local_values(gradient.detach())
                self._sums[name] = self._sums[name] + local if name in self._sums else local.clone()

        return hook

    # ---- steps of the optimizer

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Arguments | None:
        if self._is_paused or not self._view.owns(optimizer) or is_capturing():
            return None
        given = with_closure_followed(args, kwargs, partial(self._see_gradients, optimizer), self._paused)
        if given is None:
            self._see_gradients(optimizer)
        return given

    def _see_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Record what the optimizer gets, and repeat the passes and the step."""
        if not self._is_recording:
            return
        is_first = not self._gradients
        for group in self._view.groups():  # now, as a scheduler changes them after the step
            self._options_of_step.setdefault(group.parameters, group)
        for part in self._view.gradients(optimizer):
            if self._options.has_parameter(part.name):
                pending = self._pending(part)
                self._gradients[pending.key] = pending
        if is_first:
            self._digest_states()
            self._outputs.post(self._number, replica_candidates(self._passes))
            self._repeat_passes()
        if self._replays.number:
            with self._paused():
                self._replays.repeat_update(self._number, optimizer)

    def _digest_states(self) -> None:
        """Start to digest the states that the optimizer gets, if it is known what the step before has left."""
        parts = [*self._view.states()] if self._states_left else []
        keys: list[Key] = [(part.kind, part.name, part.state, 0) for part in parts]
        self._states_given = keys, start_digests([part.values.detach() for part in parts])

    def _repeat_passes(self) -> None:
        if self._is_recording and self._replays.number:
            with self._paused():
                passes = [each for each in self._passes if each.has_backward]
                self._replays.repeat_passes(self._number, passes, [*self._gradients.values()])

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_paused and self._view.owns(optimizer) and not is_capturing():
            self._has_stepped = True
            self._hook_modules(self._options.is_recorded(self._number + 1))

    def _end_step(self) -> None:
        """End the step if the optimizer has stepped since it began."""
        if self._has_stepped:
            self._write_step(has_update=True)
            self._start_step()

    def _start_step(self) -> None:
        self._outputs.learn()
        self._is_recording = self._options.is_recorded(self._number)

    def _hook_modules(self, is_recorded: bool) -> None:
        """Put hooks on modules, or take them off: not inside a call, for which torch has already looked them up."""
        if is_recorded and self._hooks is None:
            is_full = self._options.tensors == "full"
            self._hooks = ModuleHooks(self._names, lambda: self._current, lambda: self._passes, is_full=is_full)
            for name, parameter in self._root.named_parameters():
                name = unwrapped_name(name)
                is_small = 0 < parameter.numel() <= MOST_ELEMENTS_ACCUMULATED and parameter.requires_grad
                if is_small and self._view.weights_follow_the_hook and self._options.has_parameter(name):
                    handle: Any = parameter.register_hook(self._sum_gradient(name))  # type: ignore[no-untyped-call]
                    self._sum_hooks.append(handle)
        elif not is_recorded and self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
            for handle in self._sum_hooks:
                handle.remove()
            self._sum_hooks.clear()

    def _write_step(self, *, has_update: bool, is_skipped: bool = False) -> None:
        """Write the step that is over, if it is one of those that are recorded, and forget it."""
        if self._is_recording:
            passes = [each for each in self._passes if each.has_backward]
            is_skipped = is_skipped or self._view.num_skipped() > self._num_skipped
            record = StepRecord(
                number=self._number,
                has_update=has_update,
                passes=tuple(each.record() for each in passes),
                tensors=(*self._step_tensors(passes), *self._state_tensors()),
                groups=tuple(self._options_of_step.values()) if has_update else self._view.groups(),
                reported_norm=self._view.reported_norm() if has_update else None,
                loss_scale=self._view.loss_scale(),
                is_skipped=is_skipped,
                num_evaluations=self._num_evaluations + len(self._passes) - len(passes),
                autocast=next((each.autocast for each in passes if each.autocast), ""),
            )
            self._writer.write_step(replace(record, gradient_norm=_norm(record.tensors)))
            self._num_written += 1
        else:
            self._states_left = {}
        self._states_given = ([], list)
        self._number += has_update
        for each in self._passes:
            each.forget()
        self._passes, self._accumulated, self._has_stepped = [], [], False
        self._gradients, self._options_of_step, self._sums = {}, {}, {}
        self._num_evaluations = 0
        self._num_skipped = self._view.num_skipped()
        self._replays.forget()

    def _step_tensors(self, passes: list[Pass]) -> tuple[TensorRecord, ...]:
        return finished(
            [*merged(passes), *self._accumulated, *self._gradients.values()],
            num_passes=len(passes),
            deviations=self._replays.deviations,
        )

    def _state_tensors(self, *, is_start: bool = False) -> tuple[TensorRecord, ...]:
        """Return weights and optimizer state; frozen weights and buffers only at the start, or where they changed."""
        pending = []
        with torch.no_grad():
            trained = {name for group in self._view.groups() for name in group.parameters}
            for part in (*self._view.weights(), *self._view.states()):
                if (is_start or part.name in trained) and self._options.has_parameter(part.name):
                    pending.append(self._pending(part))  # noqa: PERF401  # a comprehension of five lines
            for name, buffer in self._root.named_buffers():
                name = unwrapped_name(name)
                if self._options.has_parameter(name):
                    values = local_part(buffer)
                    places = self._places.places(name, None, values, is_term=False)
                    pending.append(PendingTensor.of(("buffer", name, "", 0), values, places))
        is_measured = not is_start and self._replays.deviations is not None
        deviations = self._replays.drift | (self._replays.deviations or {}) if is_measured else {}
        return self._with_states_before(finished(pending, deviations=deviations))

    def _with_states_before(self, tensors: tuple[TensorRecord, ...]) -> tuple[TensorRecord, ...]:
        """Return the tensors, with digests of the states that were changed between the step before and this one."""
        keys, wait = self._states_given
        given = {key: xxhash.xxh3_128_hexdigest(bits) for key, bits in zip(keys, wait(), strict=True)}
        changed = {key: digest for key, digest in given.items() if self._states_left.get(key, digest) != digest}
        self._states_left = {each.key: each.digest for each in tensors if each.kind in ("state", "master")}
        return tuple(
            replace(each, digest_before=changed[each.key]) if each.key in changed else each for each in tensors
        )

    def _pending(self, part: Part, *, kind: Any = None, part_name: str = "") -> PendingTensor:
        places: tuple[Place, ...] = self._places.places(
            part.name, part.index, part.values, is_term=part.is_term, index_in_shard=part.index_in_shard
        )
        key = (kind or part.kind, part.name, part_name or part.state, 0)
        is_full = self._options.tensors == "full"
        return PendingTensor.of(key, part.values.detach(), places, scale=part.scale, is_full=is_full)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self._is_paused = True
        try:
            with repeating_calls():
                yield
        finally:
            self._is_paused = False


def _norm(tensors: tuple[TensorRecord, ...]) -> float | None:
    squares = [each.readings[0].sketch.sum_squares for each in tensors if each.kind == "gradient" and each.readings]
    return sqrt(sum(squares)) if squares else None
