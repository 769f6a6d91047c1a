"""Lets the worlds of `tp_spawn` run functions of the test's own module, in any import mode, asserts explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpcheck.pytest_plugin.messages import ModuleFile
from tpcheck.pytest_plugin.rank_config import import_as_pytest_does, rank_config
from tpcheck.world import Rank


class Caller:
    """Stands before the function that a world is told to run, and so is loaded on the rank before that function is."""

    def __init__(self, settings: bytes, imports: tuple[ModuleFile, ...]) -> None:
        self._settings = settings
        self._imports = imports

    def __call__(self, rank: Rank, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(rank, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _caller, (self._settings, self._imports)


def _caller(settings: bytes, imports: tuple[ModuleFile, ...]) -> Caller:
    config = rank_config(settings)
    for file in imports:
        import_as_pytest_does(file, config)
    return Caller(settings, imports)
