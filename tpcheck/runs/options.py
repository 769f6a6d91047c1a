"""The options of `record`, checked before the loop starts."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
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
        if not (self.steps is None or callable(self.steps) or hasattr(self.steps, "__contains__")):
            raise UsageError("steps", self.steps, "a range or another container of step numbers, a function, or None")
        if self.tensors not in ("sketch", "full"):
            raise UsageError("tensors", self.tensors, "'sketch' or 'full'")
        if not isinstance(self.replays, int) or isinstance(self.replays, bool) or self.replays < 0:
            raise UsageError("replays", self.replays, "a number of replays, 0 or more")
        if not all(isinstance(pattern, str) for pattern in self._patterns):
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
