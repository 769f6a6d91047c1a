"""The callback for transformers' Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from tpcheck.batches.options import WatchArguments, takes_watch_options
from tpcheck.trainer.model import ModelWatch, watch_model

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11


class TpcheckCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Compares what the ranks of each TP group train on, labels included, at each forward pass.

    Args:
        options: As in `tpcheck.watch`.

    Raises:
        UsageError: When training begins: an argument or a setting is wrong.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[tpcheck.TpcheckCallback()])  # doctest: +SKIP
    """

    @takes_watch_options
    def __init__(self, **options: Unpack[WatchArguments]) -> None:
        self._options = options
        self._watch: ModelWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the hook on the model, and observe the loader that the Trainer is about to iterate."""
        self._remove()  # of an earlier training that ended in an error
        self._watch = watch_model(kwargs["model"], loader=kwargs.get("train_dataloader"), **self._options)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hook."""
        self._remove()

    def _remove(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.remove()
