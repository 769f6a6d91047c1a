"""A callback for Lightning's Trainer, which is given each batch before it is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpcheck.batches.options import WatchArguments, WatchOptions, takes_watch_options
from tpcheck.batches.provenance import LoaderObserver
from tpcheck.batches.watcher import Watcher

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11

try:
    from lightning.pytorch import Callback
except ImportError:  # the same, published under its older name
    from pytorch_lightning import Callback


class LightningCallback(Callback):  # type: ignore[misc]  # lightning is untyped here
    """Compares what the ranks of each TP group train on, at each batch.

    Without `group` and `topology`, the groups are those of ModelParallelStrategy's device mesh.

    Args:
        options: As in `tpcheck.watch`.

    Raises:
        UsageError: An argument or a setting is wrong.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[LightningCallback()])  # doctest: +SKIP
    """

    @takes_watch_options
    def __init__(self, **options: Unpack[WatchArguments]) -> None:
        self._options = WatchOptions.resolve(**options)
        self._watcher: Watcher | None = None
        self._observers: list[tuple[Any, LoaderObserver]] = []  # by loader
        self._strategy: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Observe each loader as soon as the strategy has it ready: no event comes before it is iterated."""
        self._remove()  # of an earlier training that ended in an error
        if self._options is None or stage != "fit":
            return
        self._strategy = trainer.strategy
        process = self._strategy.process_dataloader

        def process_dataloader(loader: Any) -> Any:
            ready = process(loader)
            self._observers.append((ready, LoaderObserver(ready)))
            return ready

        self._strategy.process_dataloader = process_dataloader
        self._watcher = Watcher(self._options, model=pl_module, name=f"batches of {type(pl_module).__name__}")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Compare the batch. Where several loaders are combined, nothing is known of how it was made."""
        if self._watcher is not None:
            observers = (observer for loader, observer in self._observers if loader is trainer.train_dataloader)
            observer = next(observers, None)
            self._watcher.check(batch, None if observer is None else observer.after_batch())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell ranks that go on that this one has left."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self._remove()

    def _remove(self) -> None:
        strategy, self._strategy = self._strategy, None
        observers, self._observers = self._observers, []
        watcher, self._watcher = self._watcher, None
        if strategy is not None:
            del strategy.process_dataloader
        for _, observer in observers:
            observer.remove()
        if watcher is not None:
            try:
                watcher.leave()
            finally:
                watcher.conclude()
