"""Feeds every module other inputs than its caller does: what it makes of those is its own doing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tpcheck.collect.tree import map_tensors, named_tensors
from tpcheck.records import TensorKey

Replacement = Callable[[TensorKey, torch.Tensor], torch.Tensor]


@contextmanager
def isolated_modules(model: nn.Module, replacement: Replacement) -> Iterator[None]:
    """Hand each module `replacement(key, tensor)` for every floating-point tensor that it is given, while inside.

    Hooks that were there before see what the caller gave.
    """
    calls: Counter[str] = Counter()

    def before(name: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            given = named_tensors((*args, kwargs) if kwargs else args)
            call = calls[name]
            calls[name] += 1
            others = {
                id(tensor): replacement(TensorKey("forward", name, call, "input", path), tensor)
                for path, tensor in given
                if tensor.is_floating_point()
            }

            def replaced(tensor: torch.Tensor) -> torch.Tensor:
                return others.get(id(tensor), tensor)

            return map_tensors(replaced, args), map_tensors(replaced, kwargs)

        return hook

    handles = [
        module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
