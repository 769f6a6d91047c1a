"""Changes a module of a library right after its import, before anything else uses it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call `change` with the module, once: now if it has been imported, else as soon as it is."""
    if name in sys.modules:
        change(sys.modules[name])
    elif (finder := _ChangingFinder(name, change)) not in sys.meta_path:
        sys.meta_path.insert(0, finder)


@dataclass(frozen=True, slots=True)
class _ChangingFinder(MetaPathFinder):
    name: str
    change: Callable[[ModuleType], None]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_and_change(module: ModuleType) -> None:
                exec_module(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.change(module)

            spec.loader.exec_module = exec_and_change  # type: ignore[method-assign]
        return spec
