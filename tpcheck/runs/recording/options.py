"""The options of `record`, checked before the loop starts."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology

Steps = Container[int] | Callable[[int], bool] | None


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """What is recorded, and how.

    Attributes:
        optimizer: As in `record`.
        topology: As in `record`.
        steps: Numbers of the steps to record, or a function of the number; None for all.
        modules: Patterns of module names; one that ends in `.*` takes the module itself, too.
        tensors: Whether whole tensors are kept beside their sketches.
        replays: How many perturbed replays measure what rounding does in each recorded step.
    """

    optimizer: Any = None
    topology: Topology | None = None
    steps: Steps = None
    modules: str | Sequence[str] = "*"
    tensors: Literal["sketch", "full"] = "sketch"
    replays: int = 0

    def __post_init__(self) -> None:
        is_container = hasattr(self.steps, "__contains__") and not isinstance(self.steps, (str, bytes))
        if not (self.steps is None or callable(self.steps) or is_container):
            raise UsageError("steps", self.steps, "a range or another container of step numbers, a function, or None")
        if isinstance(self.steps, (Sequence, Set)) and not any(_is_number(step) for step in self.steps):
            raise UsageError("steps", self.steps, "at least one step, counted from 0")
        if self.topology is not None and not isinstance(self.topology, Topology):
            raise UsageError("topology", self.topology, "a tpcheck.Topology, or None")
        if self.tensors not in ("sketch", "full"):
            raise UsageError("tensors", self.tensors, "'sketch' or 'full'")
        if not _is_number(self.replays):
            raise UsageError("replays", self.replays, "a number of replays, 0 or more")
        is_several = isinstance(self.modules, (str, Sequence)) and len(self.modules) > 0
        if not (is_several and all(isinstance(pattern, str) for pattern in self._patterns)):
            raise UsageError(
                "modules", self.modules, "a pattern of module names such as 'model.layers.9.*', or several"
            )

    def is_recorded(self, step: int) -> bool:
        if self.steps is None:
            return True
        return bool(self.steps(step)) if callable(self.steps) else step in self.steps

    def has_module(self, name: str) -> bool:
        """Return whether what this module computes is recorded."""
        return any(fnmatchcase(name, pattern) or name == pattern.removesuffix(".*") for pattern in self._patterns)

    def has_parameter(self, name: str) -> bool:
        """Return whether this parameter or buffer is recorded: whether its module is."""
        return self.has_module(name.rpartition(".")[0])

    @property
    def _patterns(self) -> tuple[str, ...]:
        return (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
