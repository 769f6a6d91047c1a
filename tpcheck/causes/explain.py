"""Tries every cause on a suspect and keeps the one that explains it exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tpcheck.records import Suspect

_EXACT = 1e-3  # a cause explains a difference when at most this share of it remains


@dataclass(frozen=True, slots=True)
class Explanation:
    """A cause whose test held.

    Attributes:
        cause: Slug of the cause.
        error: Relative error that remains once the cause is taken into account.
    """

    cause: str
    error: float


def explain(suspect: Suspect) -> Explanation | None:
    """Return the cause that leaves the least error, or None where no test holds."""
    for test in _TESTS.get(suspect.kind, ()):
        found = test(suspect)
        if found is not None:
            return found
    return None


def _missing(suspect: Suspect) -> Explanation | None:
    if "missing_on_ranks" in suspect.evidence:
        return Explanation("gradient_missing", 0.0)
    return None


def _sum_of_ranks(slug: str) -> Callable[[Suspect], Explanation | None]:
    """The ranks' tensors are terms of the expected one, and were never added up."""

    def test(suspect: Suspect) -> Explanation | None:
        if not suspect.replicated or len(suspect.parts) < 2:
            return None
        return _holds(slug, sum(part.double() for part in suspect.parts), suspect)

    return test


def _scaled(slug: str, factor: Callable[[Suspect], float]) -> Callable[[Suspect], Explanation | None]:
    """Every rank's part is the expected one times a factor that follows from the number of ranks."""

    def test(suspect: Suspect) -> Explanation | None:
        scale = factor(suspect)
        if scale == 1 or not suspect.expected_parts:
            return None
        actual = torch.cat([part.double().reshape(-1) / scale for part in suspect.parts])
        expected = torch.cat([part.double().reshape(-1) for part in suspect.expected_parts])
        return _equal(slug, actual, expected, suspect)

    return test


def _num_tp(suspect: Suspect) -> float:
    return max(1, len(suspect.parts))


def _num_dp(suspect: Suspect) -> float:
    return suspect.num_replicas


def _no_shard(suspect: Suspect) -> Explanation | None:
    return Explanation("not_sharded", 0.0) if "parameter" not in suspect.where else None


def _drift(suspect: Suspect) -> Explanation | None:
    """Replicas that were equal at the start are not any more, without their gradients being told apart."""
    gradients_differ = "gradients" in suspect.evidence
    return None if suspect.where.get("phase") == "start" or gradients_differ else Explanation("replica_drift", 0.0)


def _wrong_group(suspect: Suspect) -> Explanation | None:
    return Explanation("wrong_group", 0.0)


def _fused(suspect: Suspect) -> Explanation | None:
    """The module before was cut block by block, and its output is then read in another order."""
    error = suspect.evidence.get("fused_blocks_error")
    return None if error is None else Explanation("fused_blocks_interleaved", error)


def _norm_is_local(suspect: Suspect) -> Explanation | None:
    """Every rank's norm is that of the gradients of one rank alone."""
    alone = suspect.evidence.get("norm_of_each_rank_alone", ())
    return _norms_hold("norm_is_local", suspect, alone)


def _norm_counts_replicas(suspect: Suspect) -> Explanation | None:
    """Every rank's norm is that of all gradients with those of replicated parameters counted once for each rank."""
    counted = suspect.evidence.get("norm_with_replicas_counted")
    return _norms_hold("norm_counts_replicas", suspect, () if counted is None else (counted,))


def _norms_hold(slug: str, suspect: Suspect, explanations: Sequence[float]) -> Explanation | None:
    if not explanations:
        return None
    errors = [min(abs(norm - explained) for explained in explanations) for norm in suspect.parts]
    remaining = max(errors) / suspect.expected if suspect.expected else max(errors)
    return Explanation(slug, remaining) if remaining <= _EXACT * suspect.observed else None


def _holds(slug: str, explained: torch.Tensor, suspect: Suspect) -> Explanation | None:
    return None if suspect.expected is None else _equal(slug, explained, suspect.expected.double(), suspect)


def _equal(slug: str, explained: torch.Tensor, expected: torch.Tensor, suspect: Suspect) -> Explanation | None:
    if explained.shape != expected.shape:
        return None
    norm = float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(explained - expected))
    explains = error <= suspect.allowed_error or (norm > 0 and error <= _EXACT * suspect.observed * norm)
    return Explanation(slug, error / norm if norm else error) if explains else None


_TESTS: dict[str, tuple[Callable[[Suspect], Explanation | None], ...]] = {
    "activation": (
        _fused,
        _sum_of_ranks("missing_reduce"),
        _scaled("duplicate_reduce", _num_tp),
        _scaled("mean_instead_of_sum", lambda suspect: 1 / _num_tp(suspect)),
    ),
    "gradient": (
        _missing,
        _sum_of_ranks("partial_gradient_on_replica"),
        _scaled("gradient_scaled", _num_tp),
        _scaled("gradient_scaled", lambda suspect: 1 / _num_tp(suspect)),
        _scaled("sum_instead_of_mean", _num_dp),
        _scaled("mean_instead_of_sum", lambda suspect: 1 / _num_dp(suspect)),
    ),
    "norm": (_norm_is_local, _norm_counts_replicas),
    "replica": (_sum_of_ranks("partial_gradient_on_replica"), _drift),
    "group": (_wrong_group,),
    "sharding": (_no_shard,),
}
