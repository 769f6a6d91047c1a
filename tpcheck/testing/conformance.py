"""Does a backend's adapter tell the truth? A clean model must pass, and what is planted in it must be found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tpcheck.api.model import verify
from tpcheck.errors import Mismatch
from tpcheck.report import Report
from tpcheck.topology import Topology
from tpcheck.world import spawn

if TYPE_CHECKING:
    from torch import nn

    from tpcheck.adapters import Backend

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
    from tpcheck.testing.facts import unmet_facts
    from tpcheck.testing.planting import EXPECTED, planted

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
