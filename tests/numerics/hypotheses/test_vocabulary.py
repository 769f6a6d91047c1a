"""Embeddings and losses over shards of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.numerics.evidence import suspect
from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import EmbeddingFacts, LossFacts
from tpcheck.numerics.hypotheses import explain

CHANCE = torch.Generator().manual_seed(0)
B, L, V, D = 2, 5, 12, 3
TABLE = torch.randn(V, D, generator=CHANCE, dtype=torch.float64)
TOKENS = torch.tensor([[0, 5, 6, 7, 11], [3, 9, 10, 2, 8]])


def found(output: torch.Tensor) -> Explanation | None:
    facts = EmbeddingFacts(TABLE, TABLE.chunk(2))
    return explain(suspect("activation", [output] * 2, TABLE[TOKENS], embedding=facts))


def lookup(*starts: int) -> torch.Tensor:
    """Return the sum of what two ranks look up whose rows start there."""
    total = torch.zeros(B, L, D, dtype=torch.float64)
    for shard, start in zip(TABLE.chunk(2), starts, strict=True):
        local = TOKENS - start
        is_here = (local >= 0) & (local < len(shard))
        total[is_here] += shard[local[is_here]]
    return total


@pytest.mark.parametrize("starts", [(0, 7), (0, 5), (-1, 6), (0, 0)])
def test_the_starts_that_the_ranks_used_are_found(starts: tuple[int, int]) -> None:
    explanation = found(lookup(*starts))
    assert explanation is not None
    assert explanation.cause is Cause.VOCAB_OFFSET_WRONG
    assert explanation.evidence["right"] == [0, 6]
    assert torch.equal(lookup(*explanation.evidence["starts"]), lookup(*starts))


def test_rows_of_no_offset_have_no_cause() -> None:
    assert found(TABLE[(TOKENS * 5 + 1) % V]) is None


def test_what_is_no_plain_lookup_has_no_cause() -> None:
    facts = EmbeddingFacts(TABLE, TABLE.chunk(2))
    output = TABLE[TOKENS] * 2  # scaled by the module
    assert explain(suspect("activation", [output + 1] * 2, output, embedding=facts)) is None


def test_only_replicas_of_rows_of_the_table_are_a_lookup() -> None:
    facts, output = EmbeddingFacts(TABLE, TABLE.chunk(2)), lookup(0, 7)
    wide = torch.cat([TABLE[TOKENS]] * 2, dim=-1)
    assert explain(suspect("activation", [torch.cat([output] * 2, dim=-1)] * 2, wide, embedding=facts)) is None
    parts = {"expected_parts": (TABLE[TOKENS],) * 2, "is_replicated": False}
    assert explain(suspect("activation", [output] * 2, TABLE[TOKENS], embedding=facts, **parts)) is None


def test_each_rank_may_take_its_rows_to_start_earlier_by_as_much_more() -> None:
    shards, starts = TABLE.chunk(4), (0, 2, 4, 6)
    predicted = sum(
        (
            torch.where(((start <= TOKENS) & (start + 3 > TOKENS))[..., None], shard[(TOKENS - start).clamp(0, 2)], 0)
            for shard, start in zip(shards, starts, strict=True)
        ),
        torch.zeros(B, L, D, dtype=torch.float64),
    )
    explanation = explain(
        suspect("activation", [predicted] * 4, TABLE[TOKENS], embedding=EmbeddingFacts(TABLE, shards))
    )
    assert explanation is not None
    assert explanation.evidence == {"starts": [0, 2, 4, 6], "right": [0, 3, 6, 9]}


LOGITS = torch.randn(B, L, V, generator=CHANCE, dtype=torch.float64)
LABELS = TOKENS
PARTS = LOGITS.chunk(2, dim=-1)
EXPECTED = float(torch.nn.functional.cross_entropy(LOGITS.reshape(-1, V), LABELS.reshape(-1)))


def loss_found(actual: Sequence[float], expected: float = EXPECTED) -> Explanation | None:
    parts = [torch.tensor(loss, dtype=torch.float64) for loss in actual]
    full = torch.tensor(expected, dtype=torch.float64)
    facts = LossFacts(expected, tuple(actual), LOGITS, PARTS)
    return explain(suspect("activation", parts, full, loss=facts))


def log_sum(logits: torch.Tensor) -> float:
    return float(logits.logsumexp(-1).mean())


def test_a_loss_over_the_local_vocabulary_lacks_the_sum_of_exponentials() -> None:
    explanation = loss_found([EXPECTED - log_sum(LOGITS) + log_sum(part) for part in PARTS])
    assert explanation is not None
    assert (explanation.cause, explanation.evidence) == (Cause.MISSING_REDUCE, {"lost": "sum of exponentials"})


def test_a_loss_in_which_each_rank_has_its_labels_alone_lacks_their_logits() -> None:
    label = float(LOGITS.gather(-1, LABELS[..., None]).mean())
    explanation = loss_found([log_sum(LOGITS) - label * share for share in (0.3, 0.7)])
    assert explanation is not None
    assert (explanation.cause, explanation.evidence) == (Cause.MISSING_REDUCE, {"lost": "logit of the label"})


def test_label_smoothing_over_the_local_vocabulary_is_worked_out_from_the_losses() -> None:
    smoothing = 0.1
    label = float(LOGITS.gather(-1, LABELS[..., None]).mean())
    smoothed, *local = (
        log_sum(LOGITS) - (1 - smoothing) * label - smoothing * float(each.mean()) for each in (LOGITS, *PARTS)
    )
    explanation = loss_found(local, smoothed)
    assert explanation is not None
    assert explanation.cause is Cause.MISSING_REDUCE
    assert explanation.evidence["lost"] == "mean over the vocabulary"
    assert explanation.evidence["smoothing"] == pytest.approx(smoothing)


def test_another_loss_has_no_cause() -> None:
    assert loss_found([EXPECTED + 0.1, EXPECTED + 0.2]) is None
    losses = [torch.tensor(EXPECTED + 0.1, dtype=torch.float64)] * 2
    facts = LossFacts(EXPECTED, (EXPECTED + 0.1,) * 2)  # without logits
    assert explain(suspect("activation", losses, torch.tensor(EXPECTED, dtype=torch.float64), loss=facts)) is None


def test_a_loss_over_logits_that_are_gathered_already_is_reduced_once_more() -> None:
    explanation = loss_found([EXPECTED + float(torch.tensor(2.0).double().log())] * 2)
    assert explanation is not None
    assert explanation.cause is Cause.DUPLICATE_REDUCE
