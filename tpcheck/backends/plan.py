"""Takes a transformers model's own tp_plan away, so that a backend falls back to its heuristics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn


@contextmanager
def without_plan(model: nn.Module) -> Iterator[None]:
    """Hide every tp_plan on `model`, its submodules, their classes and configurations, while inside."""
    with ExitStack() as stack:
        for owner, name in _plans(model):
            stack.enter_context(patch.object(owner, name, None))
        yield


def _plans(model: nn.Module) -> list[tuple[Any, str]]:
    found: dict[tuple[int, str], tuple[Any, str]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        for owner, name in (
            (module, "_tp_plan"),
            (type(module), "_tp_plan"),
            (config, "base_model_tp_plan"),
        ):
            if getattr(owner, name, None) is not None:
                found[id(owner), name] = (owner, name)
    return list(found.values())
