"""A backend with a fault in what it makes; the reference is never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from tpcheck.adapters import Backend, Candidate, TrainingOptions, load_backend
from tpcheck.adapters.protocols import RankLike
from tpcheck.faults.fault import Live


@dataclass(frozen=True, slots=True)
class PlantedBackend:
    """A backend in whose sharded model a fault is planted, on every rank.

    Attributes:
        plant: Plants it; may put something else in the place of `live.candidate`.
        backend: Name of the backend, or the backend.
        around: Makes a context in which both sides are trained; nothing is planted by it.
    """

    plant: Callable[[Live], None]
    backend: str | Backend = "deepspeed"
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def name(self) -> str:
        return self.backend if isinstance(self.backend, str) else self.backend.name

    def versions(self) -> Mapping[str, str]:
        return load_backend(self.backend).versions()

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        return load_backend(self.backend).resolved(options)

    @contextmanager
    def session(self, options: TrainingOptions) -> Iterator[None]:
        with load_backend(self.backend).session(options), self.around():
            yield

    def shard(self, model: Any, rank: RankLike, options: TrainingOptions) -> Candidate:
        live = Live(load_backend(self.backend).shard(model, rank, options), rank)
        self.plant(live)
        candidate: Candidate = live.candidate
        return candidate
