"""A fault in a sharded model: how it is drawn and injected, where it must be found, and which causes are right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

from tpcheck.backends.interface import Backend, Candidate, RankLike, TrainingOptions
from tpcheck.backends.registry import load_backend
from tpcheck.core.topology import Topology
from tpcheck.model.options import DEFAULTS


@dataclass(frozen=True, slots=True)
class Place:
    """Where a finding must point.

    Attributes:
        modules: Names of modules that hold the mistake, at the smallest; empty where it is nowhere in particular (a
            norm, an optimizer, a group).
        parameters: Names of parameters that bear it, where the finding is about one.
    """

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def is_right(self, where: Mapping[str, Any]) -> bool:
        """Return whether a finding's `where` points here."""
        if not self.modules and not self.parameters:
            return True
        parameter = where.get("parameter")
        module = where.get("module", str(parameter).rpartition(".")[0] if parameter else None)
        return module in self.modules or parameter in self.parameters


@dataclass(slots=True)
class Live:
    """The sharded model on one rank, as a fault is planted in it.

    Attributes:
        candidate: What trains (`tpcheck.adapters.Candidate`); for DeepSpeed with its `engine`.
        rank: The rank, as `backends.interface.RankLike`.
    """

    candidate: Any
    rank: Any

    @property
    def tp(self) -> int:
        size: int = self.rank.topology.tp
        return size

    @property
    def tp_rank(self) -> int:
        place: int = self.rank.topology.coordinate(self.rank.rank)["tp"]
        return place

    @property
    def dp_rank(self) -> int:
        place: int = self.rank.topology.coordinate(self.rank.rank)["dp"]
        return place

    def module(self, name: str) -> Any:
        return self.candidate.module.get_submodule(name)

    def parameter(self, name: str) -> Any:
        return self.candidate.module.get_parameter(name)


@dataclass(frozen=True, slots=True)
class Planting:
    """A fault that has been drawn.

    Attributes:
        plant: Plants it; called on every rank once the model is sharded.
        place: Where it is.
    """

    plant: Callable[[Live], None]
    place: Place


@dataclass(frozen=True, slots=True)
class Draw:
    """Chooses where a fault goes, the same for the same seed.

    Attributes:
        random: The generator of this fault and seed.
        modules: Names of the model's modules.
        parameters: Names and shapes of its parameters.
        topology: Of the run.
    """

    random: random.Random
    modules: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]
    topology: Topology

    def module(self, *patterns: str) -> str:
        """Return one of the modules whose names fit, such as `*.mlp.down_proj`."""
        return self.random.choice(_fitting(self.modules, patterns))

    def parameter(self, *patterns: str) -> str:
        """Return one of the parameters whose names fit."""
        return self.random.choice(_fitting(tuple(self.parameters), patterns))

    def modules_fitting(self, *patterns: str) -> tuple[str, ...]:
        """Return all modules whose names fit."""
        return tuple(_fitting(self.modules, patterns))

    def parameters_fitting(self, *patterns: str) -> tuple[str, ...]:
        """Return all parameters whose names fit."""
        return tuple(_fitting(tuple(self.parameters), patterns))

    def tp_rank(self) -> int:
        return self.random.randrange(self.topology.tp)


def _fitting(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    if not found:
        raise LookupError(f"no name fits {', '.join(patterns)}")
    return found


@dataclass(frozen=True, slots=True)
class ModelFault:
    """A bug of a sharded model, its backend or its optimizer.

    Attributes:
        name: Its slug.
        kind: Which part of training it is in.
        what: What is wrong, in one sentence.
        draw: Draws where it goes.
        checks: The checks that may catch it first.
        causes: The causes that are right to name for its first finding; None for a bug that has no name.
        link: The real bug that it stands for, upstream.
        family: The model type that it is planted in.
        topology: Of the run; the first of several.
        topologies: All in which it is the same bug, of which the seed draws one; None for those with more ranks, too,
            where two TP ranks are enough.
        settings: Of the model.
        config: Of the backend.
        zero_stage: ZeRO stage.
        ignore_plan: Whether the backend's heuristics shard the model.
        steps: Steps to train: one where the first must show it.
        dtypes: Where it must show.
        around: Makes the context in which both sides are trained, as with another kind of loss.
    """

    name: str
    kind: str
    what: str
    draw: Callable[[Draw], Planting]
    checks: tuple[str, ...]
    causes: tuple[str | None, ...]
    link: str | None = None
    family: str = "llama"
    topology: Topology = field(default_factory=lambda: Topology(tp=2))
    topologies: tuple[Topology, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    zero_stage: int = 0
    ignore_plan: bool = False
    steps: int = 2
    dtypes: tuple[str, ...] = ("float64", "float32")
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def seeded(self, seed: int) -> ModelFault:
        """Return the fault in the topology that the seed draws: the first for seed 0."""
        more = (Topology(tp=4), Topology(tp=2, dp=2)) if self.topology == Topology(tp=2) else ()
        all_of_them = self.topologies or (self.topology, *more)
        return replace(self, topology=all_of_them[seed % len(all_of_them)])

    def drawn(self, modules: Sequence[str], parameters: Mapping[str, tuple[int, ...]], seed: int) -> Planting:
        """Return the fault at a place of a model, the same for the same seed."""
        chance = random.Random(f"{self.name}/{seed}")
        return self.draw(Draw(chance, tuple(modules), parameters, self.topology))


@dataclass(frozen=True, slots=True)
class PlantedBackend:
    """A backend in whose sharded model a fault is planted, on every rank.

    Attributes:
        plant: Plants it; may put something else in the place of `live.candidate`.
        backend: Name of the backend, or the backend.
        around: Makes a context in which both sides are trained; nothing is planted by it.
    """

    plant: Callable[[Live], None]
    backend: str | Backend = DEFAULTS.backend
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
