"""What a vocabulary-parallel embedding or loss would give under the mistakes that are known of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import log

import torch

from tpcheck.core.causes import Cause
from tpcheck.core.placement import Shard
from tpcheck.numerics.checks.activations import ComparedActivation, ComparedActivations
from tpcheck.numerics.checks.linear import own_weights, reference_weight
from tpcheck.numerics.evidence import Evidence, Hypothesis

_MOST_SHIFTS = 8  # candidates that the wrong rows suggest


def embedding_hypotheses(evidence: Evidence, step: int, one: ComparedActivation) -> Iterator[Hypothesis]:
    """Yield what the lookup would give if ranks took their shard of the vocabulary to start somewhere else."""
    name = f"{one.key.module}.weight"
    layout = evidence.layouts.get(name)
    placement = layout.placement() if layout is not None else None
    table, shards = reference_weight(evidence, step, name), own_weights(evidence, step, name)
    if not isinstance(placement, Shard) or placement.dim != 0 or table is None or shards is None:
        return
    tokens = _rows_of(one.expected, table)
    if tokens is None or not one.placed.is_replicated:
        return
    starts = tuple(accumulate((len(shard) for shard in shards), initial=0))[:-1]
    for shift in _suggested_shifts(one, tokens, table, starts):
        for moved in _moved_starts(starts, shift):
            found = _looked_up(tokens, shards, moved)
            yield Hypothesis(
                Cause.VOCAB_OFFSET_WRONG, (found,) * len(shards), {"starts": list(moved), "right": list(starts)}
            )


def loss_hypotheses(evidence: Evidence, step: int, activations: ComparedActivations) -> Iterator[Hypothesis]:
    """Yield what a mean cross entropy over shards of the vocabulary would be without, or with one more, reduction."""
    expected, losses = evidence.reference[step].loss, [part.loss for part in evidence.candidate[step]]
    tp = len(losses)
    yield _losses(Cause.DUPLICATE_REDUCE, [expected + log(tp)] * tp, sum_of_exponentials_times=tp)
    one = _sharded_logits(activations)
    if one is None:
        return
    for kept in (one.expected.shape[1] - 1, one.expected.shape[1]):  # the last position predicts nothing
        whole = float(one.expected[:, :kept].double().logsumexp(-1).mean())
        own = [float(part[:, :kept].double().logsumexp(-1).mean()) for part in one.placed.parts]
        yield _losses(Cause.MISSING_REDUCE, [expected - whole + local for local in own], lost="sum of exponentials")
        if abs(sum(losses) - (tp - 1) * whole - expected) < abs(expected) * 1e-6:
            yield _losses(Cause.MISSING_REDUCE, losses, lost="logit of the label")
        yield from _smoothed_locally(
            expected,
            losses,
            log_sum=whole,
            mean=float(one.expected[:, :kept].double().mean()),
            own_means=[float(part[:, :kept].double().mean()) for part in one.placed.parts],
            sizes=[part.shape[-1] for part in one.placed.parts],
        )


def _smoothed_locally(
    expected: float,
    losses: Sequence[float],
    *,
    log_sum: float,
    mean: float,
    own_means: Sequence[float],
    sizes: Sequence[int],
) -> Iterator[Hypothesis]:
    """Yield what a smoothed cross entropy would be with the mean over each rank's own part of the vocabulary.

    The loss is log_sum - (1 - s) * label - s * mean. Nobody tells s: it is how much the ranks' losses differ, against
    their means. It is the smoothing itself, or, as in Megatron, what it comes to over as many tokens as one rank has:
    `families.special_cases.MEGATRON_LABEL_SMOOTHING`.

    Args:
        expected: The loss, smoothed over the whole vocabulary.
        losses: The ranks' losses.
        log_sum, mean: Means over all positions, of the log of the sum of exponentials and of the logits.
        own_means: Means of each rank's logits.
        sizes: How many tokens each rank has.
    """
    first, last = own_means.index(min(own_means)), own_means.index(max(own_means))
    spread = own_means[last] - own_means[first]
    own = (losses[first] - losses[last]) / spread if spread else 0.0
    if not 0 < own < 1:
        return
    num_own, num_all = sizes[0], sum(sizes)
    for whole in (own, own * (num_own - 1) / num_own * num_all / (num_all - 1)):
        label = (log_sum - whole * mean - expected) / (1 - whole)
        wrong = [log_sum - (1 - own) * label - own * local for local in own_means]
        yield _losses(Cause.MISSING_REDUCE, wrong, lost="mean over the vocabulary", smoothing=own)


def _sharded_logits(activations: ComparedActivations) -> ComparedActivation | None:
    """Return the last output that is cut along its last dim, of which the loss is made."""
    outputs = [one for one in activations.compared.values() if one.key.role == "output" and one.expected.dim() == 3]
    return next(
        (
            one
            for one in reversed(outputs)
            if isinstance(one.placed.placement, Shard) and one.placed.placement.dim == 2 and one.found.agrees
        ),
        None,
    )


def _losses(cause: Cause, losses: Sequence[float], **evidence: object) -> Hypothesis:
    return Hypothesis(cause, tuple(torch.tensor(loss, dtype=torch.float64) for loss in losses), evidence)


def _rows_of(looked_up: torch.Tensor, table: torch.Tensor) -> torch.Tensor | None:
    """Return which row of `table` stands at each position, or None where one is none of them: no plain lookup."""
    if looked_up.shape[-1:] != table.shape[1:]:
        return None
    _, rows = torch.cdist(looked_up.double().reshape(-1, table.shape[1]), table.double()).min(dim=1)
    exact = table[rows] == looked_up.reshape(-1, table.shape[1])
    return rows.reshape(looked_up.shape[:-1]) if bool(exact.all()) else None


def _suggested_shifts(
    one: ComparedActivation, tokens: torch.Tensor, table: torch.Tensor, starts: Sequence[int]
) -> list[int]:
    """Return by how much the rows that stand in wrong places are off, the most frequent first."""
    actual = one.placed.parts[0].double().reshape(-1, table.shape[1])
    distances, rows = torch.cdist(actual, table.double()).min(dim=1)
    wrong = (distances <= max(one.found.allowed, 1e-9)) & (rows != tokens.reshape(-1))
    values, counts = (tokens.reshape(-1) - rows)[wrong].unique(return_counts=True)  # type: ignore[no-untyped-call]
    frequent: list[int] = values[counts.argsort(descending=True)].tolist()
    return list(dict.fromkeys([*frequent[:_MOST_SHIFTS], *(-start for start in starts if start)]))


def _moved_starts(starts: Sequence[int], shift: int) -> Iterator[tuple[int, ...]]:
    """Yield where the ranks may think that they start: one of them by `shift` elsewhere, or each by that much more."""
    for rank in range(len(starts)):
        yield tuple(start + shift if one == rank else start for one, start in enumerate(starts))
    for unit in {shift, *(shift // rank for rank in range(1, len(starts)) if shift % rank == 0)}:
        yield tuple(start + unit * rank for rank, start in enumerate(starts))


def _looked_up(tokens: torch.Tensor, shards: Sequence[torch.Tensor], starts: Sequence[int]) -> torch.Tensor:
    """Return the sum of what each rank finds of the tokens, its rows being counted from its start."""
    total = torch.zeros((*tokens.shape, shards[0].shape[1]), dtype=shards[0].dtype)
    for shard, start in zip(shards, starts, strict=True):
        local = tokens - start
        held = (local >= 0) & (local < len(shard))
        total += torch.where(held[..., None], shard[local.clamp(0, max(0, len(shard) - 1))], 0)
    return total
