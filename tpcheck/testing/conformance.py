"""Does a backend's adapter tell the truth? A clean model must pass, and what is planted in it must be found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tpcheck.backends.interface import Backend, Candidate, TrainingOptions
from tpcheck.backends.registry import load_backend
from tpcheck.core.errors import Mismatch
from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import FaultyBackend, Live
from tpcheck.model.verify import verify
from tpcheck.numerics.tensors import map_tensors
from tpcheck.report.report import Report
from tpcheck.world.world import spawn


def unmet_facts(
    rank: Any, backend: str | Backend, build: Callable[[], nn.Module], config: Mapping[str, Any]
) -> list[str]:
    """Return what this rank's candidate does not keep to, in words. Collective over the world."""
    loaded = load_backend(backend)

    def rebuild() -> nn.Module:
        torch.manual_seed(0)
        return build().to(rank.device)

    options = loaded.resolved(TrainingOptions(dtype=torch.float32, config=config, rebuild=rebuild))
    with loaded.session(options):
        model = rebuild()
        names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        candidate = loaded.shard(model, rank, options)
        told = {name: _description(layout) for name, layout in candidate.layouts().items()}
        unmet = [
            *_wrong_identity(loaded),
            *_wrong_names(candidate, names),
            *_wrong_shapes(candidate, names, rank.topology, rank.rank),
            *_no_copies(candidate, names),
        ]
        everyone: tuple[Any, ...] = rank.gather(told)
        if any(everyone[peer] != told for peer in rank.topology.peers(rank.rank, "tp")):
            unmet.append("the ranks of a TP group tell different layouts")
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
        held = tuple(candidate.parameter(name).shape)
        if layout.shape != shape:
            yield f"the layout of {name} is of a tensor of shape {layout.shape}, not {shape}"
        if layout.local_shapes[tp_rank] != held:
            yield f"parameter({name!r}) has the shape {held}, and its layout says {layout.local_shapes[tp_rank]}"


def _no_copies(candidate: Candidate, names: Mapping[str, Any]) -> Iterator[str]:
    name = next(iter(names))
    before = candidate.parameter(name)
    kept = before.detach().clone()
    before.data.add_(1)
    if not torch.equal(candidate.parameter(name), kept):
        yield f"parameter({name!r}) is no copy"
    if type(before) is not torch.Tensor:
        yield f"parameter({name!r}) is a {type(before).__name__}, not a plain tensor"


def _description(layout: Any) -> tuple[Any, ...]:
    source = None if layout.source is None else tuple(layout.source.tolist())
    return layout.shape, layout.local_shapes, source


_SCALE = 1.01


def planted(backend: str | Backend, fault: str) -> FaultyBackend:
    """Return a backend whose candidates bear the fault of that name."""

    def plant(live: Live) -> None:
        live.candidate = _FAULTS[fault](live.candidate)

    return FaultyBackend(plant, backend)


def _scaled_weight(candidate: Candidate) -> Candidate:
    with torch.no_grad():
        _a_matrix(candidate).mul_(_SCALE)
    return candidate


def _scaled_output(candidate: Candidate) -> Candidate:
    def scaled(module: nn.Module, args: Any, output: Any) -> Any:
        return map_tensors(lambda tensor: tensor * _SCALE, output)

    owner = next(one for one in candidate.module.modules() if _a_matrix(candidate) in _own(one))
    owner.register_forward_hook(scaled)
    return candidate


def _scaled_gradient(candidate: Candidate) -> Candidate:
    return _Scaling(candidate)


def _skipped_step(candidate: Candidate) -> Candidate:
    return _Standing(candidate)


_FAULTS: Mapping[str, Callable[[Candidate], Candidate]] = {
    "a scaled weight": _scaled_weight,
    "a scaled output": _scaled_output,
    "a scaled gradient": _scaled_gradient,
    "a skipped step": _skipped_step,
}
EXPECTED: Mapping[str, str] = {
    "a scaled weight": "weights_match_reference",
    "a scaled output": "outputs_match_reference",
    "a scaled gradient": "gradients_match_reference",
    "a skipped step": "updates_match_reference",
}
"""The check that must find each fault."""


class _Borne:
    """Hands everything on to the candidate that it is put around."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._candidate, name)


class _Scaling(_Borne):
    """Scales what reaches the parameter, before anybody reduces it."""

    def forward(self, batch: Mapping[str, Any]) -> Any:
        matrix = _a_matrix(self._candidate)
        if matrix not in getattr(self, "_hooked", ()):
            self._hooked = {matrix}
            matrix.register_hook(lambda gradient: gradient * _SCALE)  # type: ignore[no-untyped-call]
        return self._candidate.forward(batch)


class _Standing(_Borne):
    """Does everything that a step does, and leaves the weights where they were."""

    def step(self) -> None:
        before = {name: one.detach().clone() for name, one in self._candidate.module.named_parameters()}
        self._candidate.step()
        with torch.no_grad():
            for name, parameter in self._candidate.module.named_parameters():
                parameter.copy_(before[name])


def _a_matrix(candidate: Candidate) -> nn.Parameter:
    """Return the last matrix that is sharded, or the last there is; that of a linear module, whose output it scales."""
    layouts = candidate.layouts()
    matrices = [(name, parameter) for name, parameter in candidate.module.named_parameters() if parameter.dim() == 2]
    sharded = [one for name, one in matrices if name in layouts and not layouts[name].is_replicated]
    return (sharded or [one for _, one in matrices])[-1]


def _own(module: nn.Module) -> set[nn.Parameter]:
    return set(module.parameters(recurse=False))


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

    What a conforming backend keeps to:

    - a model that it shards rightly passes every check, and something of it is sharded;
    - parameters bear the reference's names; what it hands out of them are copies, of the shapes that its layouts say;
    - all ranks of a TP group tell the same layouts and gradient norm, and the groups are those of the topology;
    - it hands out what is really there: a weight that is scaled, an output that is scaled, a gradient that is scaled
      and a step that is skipped are each found by the check they are for.

    Args:
        backend: The name of an installed backend, or one as an object.
        build: Returns an unsharded model that the backend shards rightly; a small Llama by default.
        batch: As for `tpcheck.verify`.
        topology: Two TP ranks by default.
        config: The backend's own configuration.
        timeout: Seconds until a run that hangs is ended.

    Raises:
        Mismatch: The backend does not conform; the message says in which points, `report` is that of the clean run.

    Example:
        >>> backend_conformance(MyBackend())  # doctest: +SKIP
    """

    topology = topology or Topology(tp=2)
    build = build or _small_llama

    def verified(candidate: str | Backend) -> Report:
        return verify(
            build, batch, topology=topology, backend=candidate, config=config, steps=1, timeout=timeout, checks=None
        )

    clean = verified(backend)
    if not clean.passed:
        raise Mismatch(f"a clean run does not pass:\n{clean.to_text()}", clean)
    with spawn(topology, timeout=timeout) as world:
        told = world.run(unmet_facts, backend, build, dict(config or {}))
    unmet = list(dict.fromkeys(fact for of_rank in told for fact in of_rank))
    for fault, check in EXPECTED.items():
        report = verified(planted(backend, fault))
        if check not in {finding.check for finding in report.findings}:
            unmet.append(f"{fault} is not found by {check}: the verdict is {report.verdict.verdict}")
    if unmet:
        raise Mismatch("the backend does not conform:\n" + "\n".join(f"  {one}" for one in unmet), clean)
    return clean


def require_conformance(backend: str | Backend, **options: Any) -> None:
    """Run the kit in a test: it fails with what is not met, without the kit's own stack.

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
