"""The conformance kit of backends: a clean model must pass, and every injected fault must be found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tpcheck.backends.interface import Backend, Candidate, TrainingOptions
from tpcheck.backends.registry import load_backend, modules_of
from tpcheck.core.errors import Mismatch
from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import FaultyBackend, Live
from tpcheck.model.verify import verify
from tpcheck.numerics.tensors import map_tensors
from tpcheck.report.report import Report
from tpcheck.world.world import spawn


def unmet_requirements(
    rank: Any, backend: str | Backend, build: Callable[[], nn.Module], config: Mapping[str, Any]
) -> list[str]:
    """Return the requirements that this rank's candidate does not meet. Collective over the world."""
    loaded = load_backend(backend)

    def rebuild() -> nn.Module:
        torch.manual_seed(0)
        return build().to(rank.device)

    options = loaded.resolved(TrainingOptions(dtype=torch.float32, config=config, rebuild=rebuild))
    with loaded.session(options):
        model = rebuild()
        names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        candidate = loaded.shard(model, rank, options)
        layouts = {name: _description(layout) for name, layout in candidate.layouts().items()}
        unmet = [
            *_wrong_identity(loaded),
            *_wrong_names(candidate, names),
            *_wrong_shapes(candidate, names, rank.topology, rank.rank),
            *_not_copies(candidate, names),
        ]
        by_rank: tuple[Any, ...] = rank.gather(layouts)
        if any(by_rank[peer] != layouts for peer in rank.topology.peers(rank.rank, "tp")):
            unmet.append("the ranks of a TP group return different layouts")
    return unmet


def _wrong_identity(backend: Backend) -> Iterator[str]:
    if not isinstance(backend.name, str) or not backend.name:
        yield "the backend has no name"
    if not all(isinstance(text, str) for item in backend.versions().items() for text in item):
        yield "versions() is not a mapping of names to texts"


def _wrong_names(candidate: Candidate, names: Mapping[str, Any]) -> Iterator[str]:
    known = dict(candidate.module.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in known:
            yield f"{name} of the reference is no parameter of candidate.module"


def _wrong_shapes(
    candidate: Candidate, names: Mapping[str, tuple[int, ...]], topology: Topology, rank: int
) -> Iterator[str]:
    layouts = candidate.layouts()
    tp_rank = topology.coordinate(rank)["tp"]
    for name, shape in names.items():
        if name not in layouts:
            continue
        layout = layouts[name]
        local_shape = tuple(candidate.parameter(name).shape)
        if layout.shape != shape:
            yield f"the layout of {name} is of a tensor of shape {layout.shape}, not {shape}"
        if layout.local_shapes[tp_rank] != local_shape:
            yield f"parameter({name!r}) has the shape {local_shape}, but its layout says {layout.local_shapes[tp_rank]}"


def _not_copies(candidate: Candidate, names: Mapping[str, Any]) -> Iterator[str]:
    name = next(iter(names))
    before = candidate.parameter(name)
    kept = before.detach().clone()
    before.data.add_(1)
    if not torch.equal(candidate.parameter(name), kept):
        yield f"parameter({name!r}) returns a view: return a clone"
    if type(before) is not torch.Tensor:
        yield f"parameter({name!r}) is a {type(before).__name__}, not a plain tensor"


def _description(layout: Any) -> tuple[Any, ...]:
    source = None if layout.source is None else tuple(layout.source.tolist())
    return layout.shape, layout.local_shapes, source


_SCALE = 1.01
_REPLAYS = 2  # beside a fault of a hundredth, what rounding may do need not be measured well


def _sharded_matrix(candidate: Candidate) -> nn.Parameter:
    """Return the last matrix that is sharded, or else the last matrix; of a linear layer, whose output it scales."""
    layouts = candidate.layouts()
    matrices = {name: parameter for name, parameter in candidate.module.named_parameters() if parameter.dim() == 2}
    sharded = [matrix for name, matrix in matrices.items() if name in layouts and not layouts[name].is_replicated]
    return (sharded or list(matrices.values()))[-1]


def _scale_weight(live: Live) -> None:
    with torch.no_grad():
        _sharded_matrix(live.candidate).mul_(_SCALE)


def _scale_output(live: Live) -> None:
    def scaled(module: nn.Module, args: Any, output: Any) -> Any:
        return map_tensors(lambda tensor: tensor * _SCALE, output)

    matrix = _sharded_matrix(live.candidate)
    owner = next(m for m in live.candidate.module.modules() if matrix in set(m.parameters(recurse=False)))
    owner.register_forward_hook(scaled)


def _scale_gradient(live: Live) -> None:
    live.candidate = _ScaledGradient(live.candidate)


def _skip_step(live: Live) -> None:
    live.candidate = _SkippedStep(live.candidate)


# What is injected, how, and the check that must find it.
FAULTS: Mapping[str, tuple[Callable[[Live], None], str]] = {
    "a scaled weight": (_scale_weight, "weights_match_reference"),
    "a scaled output": (_scale_output, "outputs_match_reference"),
    "a scaled gradient": (_scale_gradient, "gradients_match_reference"),
    "a skipped step": (_skip_step, "updates_match_reference"),
}


class _Delegating:
    """Delegates every attribute to a candidate."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._candidate, name)


class _ScaledGradient(_Delegating):
    """Scales the gradient of a parameter before it is reduced."""

    def forward(self, batch: Mapping[str, Any]) -> Any:
        matrix = _sharded_matrix(self._candidate)
        if matrix not in getattr(self, "_hooked", ()):
            self._hooked = {matrix}
            matrix.register_hook(lambda gradient: gradient * _SCALE)  # type: ignore[no-untyped-call]
        return self._candidate.forward(batch)


class _SkippedStep(_Delegating):
    """Restores the weights after each optimizer step."""

    def step(self) -> None:
        parameters = dict(self._candidate.module.named_parameters())
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._candidate.step()
        with torch.no_grad():
            for name, parameter in self._candidate.module.named_parameters():
                parameter.copy_(before[name])


TIMEOUT = 300.0


def backend_conformance(
    backend: str | Backend,
    build: Callable[[], nn.Module] | None = None,
    batch: Any = None,
    *,
    topology: Topology | None = None,
    config: Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT,
) -> Report:
    """Run the conformance kit of `tpcheck.adapters.Backend` and return the report of the clean run.

    Requirements:

    - a model that the backend shards correctly passes every check, and some of its parameters are sharded;
    - parameters have the names of the reference; `parameter()` returns copies with the shapes of the layouts;
    - all ranks of a TP group return the same layouts and gradient norm, and the groups are those of the topology;
    - a scaled weight, a scaled output, a scaled gradient and a skipped step are each found by their check.

    Args:
        backend: The name of an installed backend, or one as an object.
        build: Returns an unsharded model that the backend shards correctly; a small Llama by default.
        batch: As for `tpcheck.verify`.
        topology: By default two TP ranks.
        config: Backend configuration.
        timeout: Time limit of a run, in seconds.

    Raises:
        Mismatch: The backend does not conform; the message lists the unmet requirements, `report` is the clean run's.

    Example:
        >>> backend_conformance(MyBackend())  # doctest: +SKIP
    """

    topology = topology or Topology(tp=2)
    build = build or _small_llama

    def verified(candidate: str | Backend, **options: Any) -> Report:
        return verify(
            build, batch, topology=topology, backend=candidate, config=config, steps=1, timeout=timeout, **options
        )

    clean = verified(backend)
    if not clean.passed:
        raise Mismatch(f"a clean run does not pass:\n{clean.to_text()}", clean)
    with spawn(
        topology, timeout=timeout, also=modules_of(backend if isinstance(backend, str) else backend.name)
    ) as world:
        by_rank = world.run(unmet_requirements, backend, build, dict(config or {}))
    unmet = list(dict.fromkeys(fact for facts in by_rank for fact in facts))
    for fault, (inject, check) in FAULTS.items():
        report = verified(FaultyBackend(inject, backend), checks=[check], replays=_REPLAYS)
        if check not in {finding.check for finding in report.findings}:
            unmet.append(
                f"injected fault {fault!r} was not detected by {check}: the verdict is {report.verdict.verdict}"
            )
    if unmet:
        raise Mismatch(
            "the backend does not conform:\n" + "\n".join(f"  {requirement}" for requirement in unmet), clean
        )
    return clean


def require_conformance(backend: str | Backend, **options: Any) -> None:
    """Run the kit in a test: a failure shows the unmet requirements without the kit's stack.

    Example:
        >>> def test_my_backend_conforms() -> None:
        ...     require_conformance(MyBackend())
    """
    __tracebackhide__ = True
    try:
        backend_conformance(backend, **options)
    except Mismatch as error:
        raise AssertionError(str(error)) from None


def _small_llama() -> nn.Module:
    from tpcheck.families.build import small_model

    return small_model("llama", {"num_hidden_layers": 1})
