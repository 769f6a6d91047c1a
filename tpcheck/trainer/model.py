"""`tpcheck.watch_model`: the batches of any loop, as the model gets them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tpcheck.batches.options import WatchArguments, WatchOptions, takes_watch_options
from tpcheck.batches.provenance import LoaderObserver
from tpcheck.batches.watcher import Watcher
from tpcheck.core.cuda import is_capturing
from tpcheck.core.errors import UsageError
from tpcheck.core.module_hooks import HiddenHooks
from tpcheck.runs.recording.passes import is_repeated_call

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11

_INNER = ("module", "_orig_mod")  # engines, DistributedDataParallel; torch.compile
_MAX_DEPTH = 8


@takes_watch_options
def watch_model(engine_or_model: nn.Module, *, loader: Any = None, **options: Unpack[WatchArguments]) -> ModelWatch:
    """Compare what the ranks of each TP group give to the model in training, labels included, at each forward pass.

    Every rank watches its own model. Evaluation (`model.eval()`, `torch.no_grad()`) is not compared.

    Args:
        engine_or_model: Called with the batch: an engine, a wrapper, or the model itself.
        loader: The data loader that the batches come from, before it is iterated. Without it nothing is known of
            random generators and samplers, and few causes can be named.
        options: As in `tpcheck.watch`.

    Raises:
        UsageError: An argument or a setting is wrong.

    Example:
        >>> watched = tpcheck.watch_model(engine, loader=loader)  # doctest: +SKIP
        >>> watched.remove()  # doctest: +SKIP
    """
    if not isinstance(engine_or_model, nn.Module):
        raise UsageError("engine_or_model", type(engine_or_model).__name__, "a torch.nn.Module")
    return ModelWatch(engine_or_model, WatchOptions.resolve(**options), loader)


class ModelWatch:
    """Made by `watch_model`.

    Attributes:
        watcher: Compares the batches; None where hooks are turned off.
    """

    def __init__(self, model: nn.Module, options: WatchOptions | None, loader: Any = None) -> None:
        self.watcher: Watcher | None = None
        self._hook: HiddenHooks | None = None
        self._observer: LoaderObserver | None = None
        if options is None:
            return
        inner = _unwrapped(model)
        self.watcher = Watcher(options, model=model, name=f"batches of {type(inner).__name__}", repeats_calls=True)
        self._forward_signature = inspect.signature(inner.forward)
        self._observer = LoaderObserver(loader) if loader is not None else None
        # The first hook: DeepSpeed's own check ends the run at the first batch, and does not report what differs.
        hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
        self._hook = HiddenHooks([(model, hook)])

    def remove(self) -> None:
        """Remove the hook, and tell ranks that go on that this one has left."""
        hook, self._hook = self._hook, None
        if hook is None or self.watcher is None:
            return
        hook.remove()
        if self._observer is not None:
            self._observer.remove()
        try:
            self.watcher.leave()  # last: it raises what `overlap` has found
        finally:
            self.watcher.conclude()

    def __enter__(self) -> ModelWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_of_the_loop = module.training and torch.is_grad_enabled() and not is_repeated_call()
        if self.watcher is not None and is_of_the_loop and not is_capturing():
            provenance = None if self._observer is None else self._observer.after_batch()
            self.watcher.check(self._batch(args, kwargs), provenance)

    def _batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments by the names that `forward` has for them."""
        try:
            named = dict(self._forward_signature.bind_partial(*args, **kwargs).arguments)
        except TypeError:  # forward will raise, and say why
            return {"args": args, **kwargs}
        for name, parameter in self._forward_signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        return named


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model inside an engine or a wrapper: it names its arguments, and may know its device mesh."""
    for _ in range(_MAX_DEPTH):
        inner = next((module for name in _INNER if isinstance(module := getattr(model, name, None), nn.Module)), None)
        if inner is None:
            return model
        model = inner
    return model
