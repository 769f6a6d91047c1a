"""A backend with a fault in what it makes; the reference is never touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tpcheck.adapters import Candidate, TrainingOptions, load_backend
from tpcheck.adapters.protocols import RankLike
from tpcheck.faults.fault import Live


@dataclass(frozen=True, slots=True)
class PlantedBackend:
    """The backend `name`, in whose sharded model `plant` plants a fault, on every rank."""

    plant: Callable[[Live], None]
    name: str = "deepspeed"

    def versions(self) -> Mapping[str, str]:
        return load_backend(self.name).versions()

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        return load_backend(self.name).resolved(options)

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        return load_backend(self.name).session(options)

    def shard(self, model: Any, rank: RankLike, options: TrainingOptions) -> Candidate:
        candidate = load_backend(self.name).shard(model, rank, options)
        self.plant(Live(candidate, rank))
        return candidate
