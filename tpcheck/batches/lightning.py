"""A callback for Lightning's Trainer, which is given each batch before it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tpcheck.batches.provenance import Observation, all_facts, observe_workers
from tpcheck.batches.rounds import Origin
from tpcheck.batches.settings import chosen_settings
from tpcheck.batches.watcher import Watcher
from tpcheck.core.topology import Topology

try:
    from lightning.pytorch import Callback
except ImportError:  # the same, published under its older name
    from pytorch_lightning import Callback


class LightningCallback(Callback):  # type: ignore[misc]  # lightning is not looked into
    """Compares what the ranks of each TP group train on, at each batch.

    The groups are those of ModelParallelStrategy's device mesh, where neither `group` nor `topology` is given.

    Args:
        group, topology, every, on_mismatch, across_dp, overlap, timeout: As in `tpcheck.watch`.

    Raises:
        UsageError: An argument or a setting is wrong.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[LightningCallback()])  # doctest: +SKIP
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
        self._settings = chosen_settings(
            group=group,
            topology=topology,
            every=every,
            on_mismatch=on_mismatch,
            across_dp=across_dp,
            overlap=overlap,
            timeout=timeout,
        )
        self._watcher: Watcher | None = None
        self._observed: list[tuple[Any, Observation]] = []  # loaders, and what is seen of them
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have each loader watched as soon as the strategy has it ready: no event comes before it is iterated."""
        self._remove()  # an earlier training that ended in an error
        if self._settings is None or stage != "fit":
            return
        strategy = trainer.strategy
        process = strategy.process_dataloader

        def watched(loader: Any) -> Any:
            ready = process(loader)
            self._observed.append((ready, observe_workers(ready)))
            return ready

        strategy.process_dataloader = watched
        self._undo = [partial(delattr, strategy, "process_dataloader")]
        self._watcher = Watcher(self._settings, model=pl_module, name=f"batches of {type(pl_module).__name__}")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Compare the batch."""
        if self._watcher is not None:
            self._watcher.check(batch, self._origin(trainer.train_dataloader))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell ranks that go on that this one has left."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks away."""
        self._remove()

    def _origin(self, loader: Any) -> Origin | None:
        """Return how the batch was made; nothing is known where several loaders are combined."""
        for ready, observation in self._observed:
            if ready is loader:
                made = observation.made()
                return Origin(made.rng, partial(all_facts, loader, made))
        return None

    def _remove(self) -> None:
        undo, self._undo = self._undo, []
        observed, self._observed = self._observed, []
        watcher, self._watcher = self._watcher, None
        for take_away in (*undo, *(observation.remove for _, observation in observed)):
            take_away()
        if watcher is not None:
            watcher.leave()
