"""A callback for transformers' Trainer. No event of the Trainer sees the batch, so it puts a hook on the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from tpcheck.topology import Topology
from tpcheck.trainer.model import ModelWatch, watch_model


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
