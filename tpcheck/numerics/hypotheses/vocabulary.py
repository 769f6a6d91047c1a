"""Causes of a vocabulary that is cut over the ranks: where an embedding's rows start, what a loss is summed over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import log

import torch

from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import LossFacts, Suspect
from tpcheck.numerics.hypotheses.proof import Hypothesis
from tpcheck.numerics.tolerance import EQUAL_ROWS, FITTED_RELATIVE_ERROR, MOST_OFFSETS


def embedding_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the lookup where ranks take their shard of the vocabulary to start somewhere else."""
    if suspect.embedding is None or not suspect.is_replicated:
        return
    table, shards = suspect.embedding.table, suspect.embedding.shards
    tokens = _tokens(suspect.expected, table)
    if tokens is None:
        return
    starts = tuple(accumulate((len(shard) for shard in shards), initial=0))[:-1]
    for offset in _suggested_offsets(suspect, tokens, table, starts):
        for moved in _moved_starts(starts, offset):
            predicted = _lookup(tokens, shards, moved)
            evidence = {"starts": list(moved), "right": list(starts)}
            yield Hypothesis(Cause.VOCAB_OFFSET_WRONG, (predicted,) * len(shards), evidence)


def _tokens(output: torch.Tensor, table: torch.Tensor) -> torch.Tensor | None:
    """Return which row of `table` stands at each position, or None where one is none of them: no plain lookup."""
    if output.shape[-1:] != table.shape[1:]:
        return None
    _, rows = torch.cdist(output.double().reshape(-1, table.shape[1]), table.double()).min(dim=1)
    is_exact = table[rows] == output.reshape(-1, table.shape[1])
    return rows.reshape(output.shape[:-1]) if bool(is_exact.all()) else None


def _suggested_offsets(suspect: Suspect, tokens: torch.Tensor, table: torch.Tensor, starts: Sequence[int]) -> list[int]:
    """Return by how much the rows at wrong positions are off, the most frequent first."""
    actual = suspect.actual_parts[0].double().reshape(-1, table.shape[1])
    distances, rows = torch.cdist(actual, table.double()).min(dim=1)
    wrong = (distances <= max(suspect.allowed_error, EQUAL_ROWS)) & (rows != tokens.reshape(-1))
    offsets, counts = (tokens.reshape(-1) - rows)[wrong].unique(return_counts=True)  # type: ignore[no-untyped-call]
    frequent: list[int] = offsets[counts.argsort(descending=True)].tolist()
    return list(dict.fromkeys([*frequent[:MOST_OFFSETS], *(-start for start in starts if start)]))


def _moved_starts(starts: Sequence[int], offset: int) -> Iterator[tuple[int, ...]]:
    """Yield where shards may be taken to start: one of them elsewhere by `offset`, or each by that much more."""
    for moved in range(len(starts)):
        yield tuple(start + offset if rank == moved else start for rank, start in enumerate(starts))
    for unit in {offset, *(offset // rank for rank in range(1, len(starts)) if offset % rank == 0)}:
        yield tuple(start + unit * rank for rank, start in enumerate(starts))


def _lookup(tokens: torch.Tensor, shards: Sequence[torch.Tensor], starts: Sequence[int]) -> torch.Tensor:
    """Return the sum of the rows that each rank finds, its shard being taken to start at its number in `starts`."""
    total = torch.zeros((*tokens.shape, shards[0].shape[1]), dtype=shards[0].dtype)
    for shard, start in zip(shards, starts, strict=True):
        local = tokens - start
        is_here = (local >= 0) & (local < len(shard))
        total += torch.where(is_here[..., None], shard[local.clamp(0, max(0, len(shard) - 1))], 0)
    return total


def loss_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield a mean cross entropy over shards of the vocabulary without, or with one more, reduction."""
    loss = suspect.loss
    if loss is None:
        return
    tp = len(loss.actual)
    yield _losses(Cause.DUPLICATE_REDUCE, [loss.expected + log(tp)] * tp, sum_of_exponentials_times=tp)
    if loss.logits is None:
        return
    for num_positions in (loss.logits.shape[1] - 1, loss.logits.shape[1]):  # the last position predicts nothing
        logits, *local_logits = (part[:, :num_positions].double() for part in (loss.logits, *loss.logits_parts))
        log_sum = float(logits.logsumexp(-1).mean())
        local_log_sums = [float(part.logsumexp(-1).mean()) for part in local_logits]
        predicted = [loss.expected - log_sum + local for local in local_log_sums]
        yield _losses(Cause.MISSING_REDUCE, predicted, lost="sum of exponentials")
        if abs(sum(loss.actual) - (tp - 1) * log_sum - loss.expected) < abs(loss.expected) * FITTED_RELATIVE_ERROR:
            yield _losses(Cause.MISSING_REDUCE, loss.actual, lost="logit of the label")
        yield from _smoothed_locally(loss, log_sum, logits, local_logits)


def _smoothed_locally(
    loss: LossFacts, log_sum: float, logits: torch.Tensor, local_logits: Sequence[torch.Tensor]
) -> Iterator[Hypothesis]:
    """Yield a smoothed cross entropy with the mean over each rank's part of the vocabulary.

    The loss is log_sum - (1 - s) * label - s * mean, with means over all positions. The smoothing s is unknown: how
    much the ranks' losses differ, over how much their means do. It is the smoothing itself, or, as in Megatron, that
    over as many tokens as one rank has (`families.special_cases.MEGATRON_LABEL_SMOOTHING`).
    """
    means = [float(part.mean()) for part in local_logits]
    lowest, highest = means.index(min(means)), means.index(max(means))
    spread = means[highest] - means[lowest]
    smoothing = (loss.actual[lowest] - loss.actual[highest]) / spread if spread else 0.0
    if not 0 < smoothing < 1:
        return
    num_local, num_all = local_logits[0].shape[-1], logits.shape[-1]
    for meant in (smoothing, smoothing * (num_local - 1) / num_local * num_all / (num_all - 1)):
        label = (log_sum - meant * float(logits.mean()) - loss.expected) / (1 - meant)
        predicted = [log_sum - (1 - smoothing) * label - smoothing * mean for mean in means]
        yield _losses(Cause.MISSING_REDUCE, predicted, lost="mean over the vocabulary", smoothing=smoothing)


def _losses(cause: Cause, losses: Sequence[float], **evidence: object) -> Hypothesis:
    return Hypothesis(cause, tuple(torch.tensor(loss, dtype=torch.float64) for loss in losses), evidence)
