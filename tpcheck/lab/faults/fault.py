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

TP2, TP4, TP2_DP2 = Topology(tp=2), Topology(tp=4), Topology(tp=2, dp=2)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a finding must point.

    Attributes:
        modules: The innermost modules that hold the fault; empty for a fault of the whole run (a norm, an optimizer, a
            group).
        parameters: The parameters that hold the fault.
    """

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def matches(self, where: Mapping[str, Any]) -> bool:
        """Return whether a finding's `where` points here."""
        if not self.modules and not self.parameters:
            return True
        parameter = where.get("parameter")
        module = where.get("module", str(parameter).rpartition(".")[0] if parameter else None)
        return module in self.modules or parameter in self.parameters


@dataclass(slots=True)
class Live:
    """The sharded model on one rank, into which a fault is injected.

    Attributes:
        candidate: The model that trains (`tpcheck.adapters.Candidate`); DeepSpeed's has an `engine`.
        rank: This rank.
    """

    candidate: Any
    rank: RankLike

    @property
    def tp(self) -> int:
        return self.rank.topology.tp

    @property
    def tp_rank(self) -> int:
        return self.rank.topology.coordinate(self.rank.rank)["tp"]

    @property
    def dp_rank(self) -> int:
        return self.rank.topology.coordinate(self.rank.rank)["dp"]

    @property
    def tp_group(self) -> Any:
        return self.rank.group("tp")

    def module(self, name: str) -> Any:
        return self.candidate.module.get_submodule(name)

    def parameter(self, name: str) -> Any:
        return self.candidate.module.get_parameter(name)


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault at the place that a seed drew.

    Attributes:
        inject: Injects the fault; called on every rank once the model is sharded.
        place: Where the fault is.
    """

    inject: Callable[[Live], None]
    place: Place


@dataclass(frozen=True, slots=True)
class Draw:
    """Chooses where to inject a fault; equal seeds choose equal places.

    Attributes:
        random: A generator seeded with the name of the fault and the seed.
        modules: Names of the model's modules.
        parameters: Names and shapes of its parameters.
        topology: The topology of the run.
    """

    random: random.Random
    modules: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]
    topology: Topology

    def module(self, *patterns: str) -> str:
        """Return a random module whose name matches one of the patterns, such as `*.mlp.down_proj`."""
        return self.random.choice(_matching(self.modules, patterns))

    def parameter(self, *patterns: str) -> str:
        """Return a random parameter whose name matches one of the patterns."""
        return self.random.choice(_matching(tuple(self.parameters), patterns))

    def modules_matching(self, *patterns: str) -> tuple[str, ...]:
        """Return all modules whose names match."""
        return tuple(_matching(self.modules, patterns))

    def parameters_matching(self, *patterns: str) -> tuple[str, ...]:
        """Return all parameters whose names match."""
        return tuple(_matching(tuple(self.parameters), patterns))

    def tp_rank(self) -> int:
        return self.random.randrange(self.topology.tp)


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    matching = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    if not matching:
        raise LookupError(f"no name matches {', '.join(patterns)}")
    return matching


@dataclass(frozen=True, slots=True)
class ModelFault:
    """A bug of a sharded model, its backend or its optimizer.

    Attributes:
        name: Its slug.
        kind: The part of training that it is in.
        what: What is wrong, in one sentence.
        draw: Chooses the place and returns the injection.
        checks: The checks that may report it first.
        causes: The right causes of its first finding; None for a bug without a named cause.
        link: An upstream issue that reports such a bug.
        backend: The backend whose model it is injected into.
        family: The model type that it is injected into.
        topology: The topology of the run at seed 0.
        topologies: All topologies in which this is the same bug; the seed selects one. By default `topology`, and where
            that is two TP ranks also four TP ranks and two replicas.
        settings: Settings of the model.
        config: Backend configuration.
        zero_stage: ZeRO stage.
        ignore_plan: Whether the backend's heuristics shard the model.
        options: Other options of `verify_family`: the optimizer, accumulation, the loss, the batch.
        steps: Steps to train; 1 where the first step must show it.
        dtypes: The dtypes at which it must show.
        dtype: The only one in which there can be such a bug; None for all.
        training_context: Returns the context in which both sides are trained, such as one with another loss.
    """

    name: str
    kind: str
    what: str
    draw: Callable[[Draw], Injection]
    checks: tuple[str, ...]
    causes: tuple[str | None, ...]
    link: str | None = None
    backend: str = DEFAULTS.backend_name
    family: str = "llama"
    topology: Topology = TP2
    topologies: tuple[Topology, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    zero_stage: int = 0
    ignore_plan: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 2
    dtypes: tuple[str, ...] = ("float64", "float32")
    dtype: str | None = None
    training_context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def at_seed(self, seed: int) -> ModelFault:
        """Return the fault in the topology that the seed selects: `topology` at seed 0."""
        more = (TP4, TP2_DP2) if self.topology == TP2 else ()
        topologies = self.topologies or (self.topology, *more)
        return replace(self, topology=topologies[seed % len(topologies)])

    def injection(self, modules: Sequence[str], parameters: Mapping[str, tuple[int, ...]], seed: int) -> Injection:
        """Return the fault at a place of a model; equal seeds choose equal places."""
        generator = random.Random(f"{self.name}/{seed}")
        return self.draw(Draw(generator, tuple(modules), parameters, self.topology))


def fault_constructor(kind: str, *checks: str, **shared: Any) -> Callable[..., ModelFault]:
    """Return the constructor of the rows of one table: `row(name, what, draw, *causes, **what_differs)`.

    Args:
        kind: The kind of all rows.
        checks: The checks of a row that names none.
        shared: Other arguments of `ModelFault` for the rows that do not set them.
    """

    def row(name: str, what: str, draw: Callable[[Draw], Injection], *causes: str | None, **options: Any) -> ModelFault:
        return ModelFault(name, kind, what, draw, **{"checks": checks, "causes": causes, **shared, **options})

    return row


@dataclass(frozen=True, slots=True)
class FaultyBackend:
    """A backend that injects a fault into the model that it shards, on every rank.

    Attributes:
        inject: Injects the fault; may replace `live.candidate`.
        backend: The backend, or its name.
        training_context: Returns the context in which both sides are trained; injects nothing.
    """

    inject: Callable[[Live], None]
    backend: str | Backend = DEFAULTS.backend
    training_context: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def name(self) -> str:
        return self.backend if isinstance(self.backend, str) else self.backend.name

    def versions(self) -> Mapping[str, str]:
        return load_backend(self.backend).versions()

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        return load_backend(self.backend).resolved(options)

    @contextmanager
    def session(self, options: TrainingOptions) -> Iterator[None]:
        with load_backend(self.backend).session(options), self.training_context():
            yield

    def shard(self, model: Any, rank: RankLike, options: TrainingOptions) -> Candidate:
        live = Live(load_backend(self.backend).shard(model, rank, options), rank)
        self.inject(live)
        candidate: Candidate = live.candidate
        return candidate
