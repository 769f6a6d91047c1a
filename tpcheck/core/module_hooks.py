"""Hooks on modules of a training loop that copies and saves those modules: no copy and no file has the hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_STATE = "__getstate__"
_COPIED_BY = ("__reduce_ex__", "__reduce__", "__deepcopy__", "__copy__")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class HiddenHooks:
    """Handles of hooks that `torch.save`, `pickle` and `copy.deepcopy` leave out of copies of their modules.

    A module is asked for its state by `__getstate__`, which the instance gets for as long as it has such hooks. Classes
    with a `__reduce_ex__`, `__reduce__` or `__deepcopy__` of their own (torch.fx's, FSDP2's) are not asked: a copy of
    these has the hooks, and pickle refuses them, unless they are removed before.
    """

    def __init__(self, handles: Iterable[tuple[nn.Module, RemovableHandle]] = ()) -> None:
        self._handles: list[tuple[nn.Module, RemovableHandle]] = []
        for module, handle in handles:
            self.add(module, handle)

    def add(self, module: nn.Module, handle: RemovableHandle) -> None:
        self._handles.append((module, handle))
        if all(getattr(type(module), name, None) is getattr(nn.Module, name, None) for name in _COPIED_BY):
            state = vars(module).setdefault(_STATE, _StateWithoutHooks(module))
            if isinstance(state, _StateWithoutHooks):
                state.hidden |= {handle.id}

    def remove(self) -> None:
        for module, handle in self._handles:
            handle.remove()
            state = vars(module).get(_STATE)
            if isinstance(state, _StateWithoutHooks):
                state.hidden -= {handle.id}
                if not state.hidden:
                    del vars(module)[_STATE]
        self._handles.clear()


class _StateWithoutHooks:
    """The `__getstate__` of one module: its state as its class gives it, without some hooks and without this."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.hidden: frozenset[int] = frozenset()

    def __call__(self) -> Any:
        of_class = getattr(type(self._module), _STATE, None)  # object has none before Python 3.11
        state = vars(self._module) if of_class is None else of_class(self._module)
        if isinstance(state, tuple) and len(state) == 2:  # with slots
            return self._without_hooks(state[0]), state[1]
        return self._without_hooks(state)

    def _without_hooks(self, state: Any) -> Any:
        if not isinstance(state, Mapping):
            return state
        cleaned = {name: value for name, value in state.items() if not isinstance(value, _StateWithoutHooks)}
        for name in _HOOKS:
            if cleaned.get(name):
                cleaned[name] = OrderedDict(
                    (number, hook) for number, hook in cleaned[name].items() if number not in self.hidden
                )
        return cleaned
