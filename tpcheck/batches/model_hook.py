"""`tpcheck.watch_model` and the callback for transformers' Trainer: the batches of any loop, as the model gets them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from tpcheck.batches.provenance import all_facts, observe_workers
from tpcheck.batches.rounds import Origin
from tpcheck.batches.settings import Settings, chosen_settings
from tpcheck.batches.watcher import Watcher
from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology

_INNER = ("module", "_orig_mod")  # engines, DistributedDataParallel; torch.compile
_DEEPEST = 8


def watch_model(
    engine_or_model: nn.Module,
    *,
    loader: Any = None,
    group: Any = None,
    topology: Topology | None = None,
    every: int | None = None,
    on_mismatch: str | Callable[[Any], None] | None = None,
    across_dp: str | None = None,
    overlap: bool | None = None,
    timeout: float | None = None,
) -> ModelWatch:
    """Compare what the ranks of each TP group give to the model in training, labels included, at each forward pass.

    Every rank watches its own. Evaluation (`model.eval()`, `torch.no_grad()`) is not looked at. What is not given comes
    from TPCHECK and `[tool.tpcheck]`, as for `tpcheck.watch`.

    Args:
        engine_or_model: Called with the batch: an engine, a wrapper, or the model itself.
        loader: The data loader that the batches come from, before it is iterated. Without it nothing is known of
            random generators and samplers, and few causes can be named.
        group, topology, every, on_mismatch, across_dp, overlap, timeout: As in `tpcheck.watch`.

    Raises:
        UsageError: An argument or a setting is wrong.

    Example:
        >>> watched = tpcheck.watch_model(engine, loader=loader)  # doctest: +SKIP
        >>> watched.remove()  # doctest: +SKIP
    """
    if not isinstance(engine_or_model, nn.Module):
        raise UsageError("engine_or_model", type(engine_or_model).__name__, "a torch.nn.Module")
    settings = chosen_settings(
        group=group,
        topology=topology,
        every=every,
        on_mismatch=on_mismatch,
        across_dp=across_dp,
        overlap=overlap,
        timeout=timeout,
    )
    return ModelWatch(engine_or_model, settings, loader)


class ModelWatch:
    """Made by `watch_model`.

    Attributes:
        watcher: Compares the batches; None where hooks are turned off.
    """

    def __init__(self, model: nn.Module, settings: Settings | None, loader: Any = None) -> None:
        self.watcher: Watcher | None = None
        self._names: inspect.Signature | None = None
        self._loader = loader
        self._remove: list[Callable[[], None]] = []
        if settings is None:
            return
        inner = _unwrapped(model)
        self.watcher = Watcher(settings, model=inner, name=f"batches of {type(inner).__name__}")
        self._names = inspect.signature(inner.forward)
        self._observation = observe_workers(loader) if loader is not None else None
        # First of all hooks: DeepSpeed's own check ends the run at the first batch without a word on what differs.
        hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
        self._remove = [hook.remove, self.watcher.leave]
        if self._observation is not None:
            self._remove.append(self._observation.remove)

    def remove(self) -> None:
        """Take the hook away. Ranks that go on are told that this one has left."""
        removing, self._remove = self._remove, []
        for remove in removing:
            remove()

    def __enter__(self) -> ModelWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.watcher is not None and module.training and torch.is_grad_enabled():
            self.watcher.check(self._batch(args, kwargs), self._origin())

    def _batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments by the names that `forward` has for them."""
        try:
            assert self._names is not None
            named = dict(self._names.bind_partial(*args, **kwargs).arguments)
        except TypeError:  # forward will raise, and say why
            return {"args": args, **kwargs}
        for name, parameter in self._names.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        return named

    def _origin(self) -> Origin | None:
        if self._observation is None:
            return None
        made = self._observation.made()
        return Origin(made.rng, partial(all_facts, self._loader, made))


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model inside an engine or a wrapper: it names its arguments, and may know its device mesh."""
    for _ in range(_DEEPEST):
        inner = next((held for name in _INNER if isinstance(held := getattr(model, name, None), nn.Module)), None)
        if inner is None:
            return model
        model = inner
    return model


class TpcheckCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not looked into
    """Compares what the ranks of each TP group train on, labels included, at each forward pass.

    Args:
        group, topology, every, on_mismatch, across_dp, overlap, timeout: As in `tpcheck.watch`. What is not given comes
            from TPCHECK and `[tool.tpcheck]`, as for `tpcheck.watch_model`.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[tpcheck.TpcheckCallback()])  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        group: Any = None,
        topology: Topology | None = None,
        every: int | None = None,
        on_mismatch: str | Callable[[Any], None] | None = None,
        across_dp: str | None = None,
        overlap: bool | None = None,
        timeout: float | None = None,
    ) -> None:
        self._settings = {
            "group": group,
            "topology": topology,
            "every": every,
            "on_mismatch": on_mismatch,
            "across_dp": across_dp,
            "overlap": overlap,
            "timeout": timeout,
        }
        self._watch: ModelWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the hook on the model, and watch the loader that the Trainer is about to iterate."""
        self._remove()  # an earlier training that ended in an error
        self._watch = watch_model(kwargs["model"], loader=kwargs.get("train_dataloader"), **self._settings)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hook away."""
        self._remove()

    def _remove(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.remove()
