"""The callback for transformers' Trainer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from transformers import TrainerCallback

from tpcheck.backends.live_groups import has_tp_library
from tpcheck.batches.options import WatchArguments, takes_watch_options
from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.core.topology import Topology
from tpcheck.runs.guarding.guard import guard as guard_model
from tpcheck.runs.recording.recorder import record as record_model
from tpcheck.trainer.model import watch_model

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11


class TpcheckCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Compares what the ranks of each TP group train on, labels included, at each forward pass.

    In a process alone, and in data parallelism without TP, it does what still has a meaning: `record` and `guard`, and
    replicas must get different samples.

    The Trainer tells no callback of an error, so hooks stay on the model where a training raises. They are removed as
    the next one begins, with the callback, or by `close()`. What a trace has until then can be read.

    Args:
        record: Path of a trace of the training, or a dict of the arguments of `tpcheck.record` with its `path`.
        guard: Compare replicas after every so many steps, as `tpcheck.guard` does, or a dict of its arguments.
        options: As in `tpcheck.watch`; `topology` counts for `record` and `guard`, too.

    Raises:
        UsageError: `record` or `guard` is wrong; when training begins: an argument or a setting is.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[tpcheck.TpcheckCallback(guard=100)])  # doctest: +SKIP
    """

    @takes_watch_options
    def __init__(
        self,
        *,
        record: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        guard: int | Mapping[str, Any] | None = None,
        **options: Unpack[WatchArguments],
    ) -> None:
        is_path = record is None or isinstance(record, (str, os.PathLike))
        if not is_path and not (isinstance(record, Mapping) and {"path"} <= {*record} <= _arguments_of(record_model)):
            raise UsageError("record", record, "a path, or a dict of the arguments of tpcheck.record with `path`")
        is_number = guard is None or (isinstance(guard, int) and not isinstance(guard, bool) and guard > 0)
        if not is_number and not (isinstance(guard, Mapping) and {*guard} <= _arguments_of(guard_model)):
            raise UsageError("guard", guard, "a positive number of steps, or a dict of the arguments of tpcheck.guard")
        self._record = record
        self._guard = guard
        self._options = options
        self._stack = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the hooks on the model, and observe the loader that the Trainer is about to iterate."""
        self.close()  # of an earlier training that ended in an error
        model = kwargs["model"]
        options = self._options
        if (self._record is not None or self._guard is not None) and _has_only_replicas(model):
            options = {"topology": Topology(dp=dist.get_world_size())} | options
        with ExitStack() as stack:
            watch = watch_model(model, loader=kwargs.get("train_dataloader"), **options)
            stack.callback(watch.remove)
            for context in self._contexts(model, kwargs.get("optimizer"), options.get("topology")):
                stack.enter_context(context)
            self._stack = stack.pop_all()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks, and write the end of the trace."""
        self._stack.close()

    def close(self) -> None:
        """Remove the hooks of a training that has raised; its last, unfinished step is not written."""
        stack, self._stack = self._stack, ExitStack()
        error = TpcheckError("the training has ended in an error")
        stack.__exit__(type(error), error, None)

    def __del__(self) -> None:
        if hasattr(self, "_stack"):
            self.close()

    def _contexts(self, model: Any, optimizer: Any, topology: Topology | None) -> list[AbstractContextManager[Any]]:
        """Return what is entered for the time of a training. The guard's hook is to run first, so it comes last."""
        common = {"optimizer": optimizer, "topology": topology}
        contexts: list[AbstractContextManager[Any]] = []
        if self._record is not None:
            given = dict(self._record) if isinstance(self._record, Mapping) else {"path": self._record}
            contexts.append(record_model(model, **{**common, **given}))
        if self._guard is not None:
            given = dict(self._guard) if isinstance(self._guard, Mapping) else {"every": self._guard}
            contexts.append(guard_model(model, **{**common, **given}))
        return contexts


def _arguments_of(function: Any) -> set[str]:
    """Return the names of the arguments that a user gives: the Trainer gives the model."""
    return {*inspect.signature(function).parameters} - {"model"}


def _has_only_replicas(model: Any) -> bool:
    """Return whether no library knows groups, so that the Trainer gives each rank other samples: all are replicas."""
    return dist.is_available() and dist.is_initialized() and not has_tp_library(model)
