"""Every cause of a training run is named by its test, on the least that shows it."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import pytest
import torch

from tests.batches.test_causes import CAUSES as OF_BATCHES
from tests.numerics.evidence import cause_of, suspect
from tests.numerics.norms import CLIPPING, NORMS, REPLICATED, SHARDED, clipped_alike, facts
from tests.numerics.norms import step as clipped_step
from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import (
    BackwardFacts,
    EmbeddingFacts,
    FusedBlocks,
    GradientFacts,
    LabelCounts,
    LabelFacts,
    LinearTerms,
    LossFacts,
    ShardFacts,
    SiblingCollectives,
    SiblingWeights,
    StepFacts,
    Suspect,
)
from tpcheck.numerics.hypotheses import TESTS, explain

CHANCE = torch.Generator().manual_seed(0)
EXPECTED, OTHER = torch.randn(2, 4, 8, generator=CHANCE, dtype=torch.float64)
HEADS = torch.cat([EXPECTED, OTHER])
HALVES = EXPECTED.chunk(2, dim=1)
TERMS = (EXPECTED * 0.3 + 0.1, EXPECTED * 0.7 - 0.1)
FIRST, LAST = EXPECTED - OTHER, OTHER  # what two micro-batches add
MICRO = GradientFacts(micro_mean=((FIRST,) * 2, (LAST,) * 2), micro_local=((FIRST + 1,) * 2, (LAST - 1,) * 2))
LOSS = torch.tensor(3.0, dtype=torch.float64)
BIAS = torch.ones(8, dtype=torch.float64)

# Causes of names in a checkpoint: `tests/checkpoints` has their tests.
OF_NAMES = {Cause.TENSOR_MISSING, Cause.TENSOR_UNEXPECTED, Cause.TIED_WEIGHT_DROPPED}


def weight(actual: torch.Tensor, expected: torch.Tensor = EXPECTED, **fields: object) -> Suspect:
    """Return a suspect of a weight that is cut along dim 0, over two ranks."""
    return suspect(
        "weight",
        actual.chunk(2),
        expected,
        **{"actual": actual, "expected_parts": expected.chunk(2), "where": {"parameter": "attn.q.weight"}, **fields},
    )


def flipped() -> torch.Tensor:
    bits = EXPECTED.clone()
    bits.view(torch.int64)[1, 2] ^= 1 << 40
    return bits


def lookup() -> Suspect:
    """Return a lookup in which rank 1 takes its rows to start one late."""
    tokens = torch.tensor([[0, 5, 3, 7]])
    table = torch.randn(8, 3, generator=CHANCE, dtype=torch.float64)
    rows = torch.where(tokens > 4, tokens - 1, tokens)
    return suspect("activation", [table[rows]] * 2, table[tokens], embedding=EmbeddingFacts(table, table.chunk(2)))


def norm(*reported: float, **fields: object) -> Suspect:
    """Return a suspect of a norm that ranks report, one number for each or one for both."""
    of_ranks = reported * (2 // len(reported))
    return suspect("norm", of_ranks, NORMS.whole, norms=facts(*of_ranks, **fields))


EXAMPLES: dict[Cause, Callable[[], Suspect]] = {
    Cause.WRONG_GROUP: lambda: suspect("group", ()),
    Cause.NOT_SHARDED: lambda: suspect("sharding", (), where={"phase": "start"}),
    Cause.SHARD_MISSING: lambda: suspect(
        "sharding", (), where={"parameter": "up.weight"}, shards=ShardFacts(0, 8, (4, 0))
    ),
    Cause.WRONG_SHARD_BOUNDARY: lambda: suspect(
        "sharding", (), where={"parameter": "up.weight"}, shards=ShardFacts(0, 9, (4, 4))
    ),
    Cause.SHARD_REPEATED: lambda: suspect("activation", [HALVES[0]] * 2, EXPECTED, expected_parts=HALVES),
    Cause.SHARD_ORDER_SWAPPED: lambda: suspect("activation", HALVES[::-1], EXPECTED, expected_parts=HALVES),
    Cause.FUSED_BLOCKS_INTERLEAVED: lambda: suspect(
        "activation", [OTHER] * 2, EXPECTED, fused_blocks=FusedBlocks(2, 1e-16)
    ),
    Cause.HEAD_MAPPING_WRONG: lambda: weight(
        torch.cat(EXPECTED.chunk(2)[::-1]),
        where={"parameter": "attn.k_proj.weight"},
        siblings=SiblingWeights(wrong=("attn.v_proj.weight",), right=("attn.q_proj.weight",)),
    ),
    Cause.VOCAB_OFFSET_WRONG: lookup,
    Cause.TENSOR_OF_ANOTHER_LAYER: lambda: suspect(
        "gradient", [OTHER] * 2, EXPECTED, others={"b": (OTHER, OTHER, OTHER)}
    ),
    Cause.MISSING_REDUCE: lambda: suspect("activation", TERMS, EXPECTED),
    Cause.DUPLICATE_REDUCE: lambda: suspect("activation", [EXPECTED * 2] * 2, EXPECTED),
    Cause.MEAN_INSTEAD_OF_SUM: lambda: suspect("activation", [EXPECTED / 2] * 2, EXPECTED),
    Cause.SUM_INSTEAD_OF_MEAN: lambda: suspect("gradient", [EXPECTED * 3] * 2, EXPECTED, num_replicas=3),
    Cause.BIAS_ADDED_PER_RANK: lambda: suspect(
        "activation",
        [EXPECTED + BIAS] * 2,
        EXPECTED,
        linear=LinearTerms((EXPECTED * 0.5, EXPECTED * 0.5 - BIAS), BIAS, (BIAS, BIAS), are_summed=True),
    ),
    Cause.REDUCED_AFTER_ACCUMULATION: lambda: suspect("gradient", [2 * FIRST + LAST] * 2, EXPECTED, gradient=MICRO),
    Cause.LAST_MICRO_BATCH_ONLY: lambda: suspect("gradient", [LAST] * 2, EXPECTED, gradient=MICRO),
    Cause.MICRO_BATCH_UNREDUCED: lambda: suspect(
        "gradient", [FIRST + 1 + LAST] * 2, EXPECTED, gradient=MICRO, num_replicas=2
    ),
    Cause.MEAN_OF_LOCAL_MEANS: lambda: suspect(
        "activation", [4 * LOSS] * 2, LOSS, labels=LabelFacts(LabelCounts(((2,), (14,)), "token_mean"), 0, 0)
    ),
    Cause.TOKEN_MEAN_INSTEAD_OF_MEAN: lambda: suspect(
        "activation", [1.75 * LOSS] * 2, LOSS, labels=LabelFacts(LabelCounts(((2,), (14,))), 1, 0)
    ),
    Cause.OPTIMIZER_SEES_ONE_SHARD: lambda: suspect(
        "update", HALVES[::-1], EXPECTED, expected_parts=HALVES, step=StepFacts(on_shards=HALVES[::-1])
    ),
    Cause.STEP_SKIPPED: lambda: suspect(
        "norm", (3.0, float("inf")), 3.0, norms=facts(3.0, float("inf")), step=StepFacts(skipped_on=(1,))
    ),
    Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK: lambda: suspect(
        "state", [HALVES[0]] * 2, EXPECTED, expected_parts=HALVES, is_replicated=False
    ),
    Cause.PARTIAL_GRADIENT_ON_REPLICA: lambda: suspect("gradient", TERMS, EXPECTED),
    Cause.GRADIENT_MISSING: lambda: suspect(
        "gradient", [EXPECTED * 0] * 2, EXPECTED, gradient=GradientFacts(missing_on=(0, 1))
    ),
    Cause.COLLECTIVE_WITHOUT_BACKWARD: lambda: suspect(
        "gradient",
        [EXPECTED * 0] * 2,
        EXPECTED,
        gradient=GradientFacts(missing_on=(0, 1)),
        backward=BackwardFacts(unseen=("all_reduce",)),
    ),
    Cause.USE_OF_MODULE_LOST: lambda: suspect(
        "gradient", [FIRST] * 2, EXPECTED, gradient=GradientFacts(uses=((FIRST,) * 2, (LAST,) * 2))
    ),
    Cause.STATISTIC_OVER_ONE_SHARD: lambda: suspect(
        "activation", [OTHER, OTHER + 1], EXPECTED, computed_alone=(OTHER, OTHER + 1)
    ),
    Cause.GRADIENT_SCALED: lambda: suspect("gradient", [EXPECTED, EXPECTED * 1.7], EXPECTED),
    Cause.NORM_IS_LOCAL: lambda: norm(*NORMS.of_ranks),
    Cause.NORM_COUNTS_REPLICAS: lambda: norm(NORMS.counting_replicas),
    Cause.NORM_LEAVES_OUT_SHARDS: lambda: norm(NORMS.of_ranks[0]),
    Cause.NORM_AVERAGED_OVER_RANKS: lambda: norm(sum(NORMS.of_ranks) / 2),
    Cause.NORM_SUMMED_OVER_RANKS: lambda: norm(sum(NORMS.of_ranks)),
    Cause.NORM_OF_WRONG_ORDER: lambda: norm(NORMS.whole_of_order(1.0)),
    Cause.NORM_WITHOUT_ROOT: lambda: norm(NORMS.whole**2),
    Cause.NORM_BEFORE_UNSCALING: lambda: norm(NORMS.whole * 1024),
    Cause.NORM_AFTER_CLIPPING: lambda: norm(NORMS.whole * CLIPPING.factor(NORMS.whole)),
    Cause.REPORTED_NORM_WRONG: lambda: norm(NORMS.whole * 1.1, step=clipped_alike(NORMS.whole)),
    Cause.CLIPPED_PER_GROUP: lambda: norm(
        NORMS.norm_of(SHARDED),
        step=clipped_step(
            {name: CLIPPING.factor(NORMS.norm_of(group)) for group in (SHARDED, REPLICATED) for name in group}
        ),
    ),
    Cause.CLIP_EPSILON_DIFFERS: lambda: suspect(
        "update", [EXPECTED * 1.1] * 2, EXPECTED, norms=facts(implied=(NORMS.whole + 0.01 - CLIPPING.epsilon,) * 2)
    ),
    Cause.REPLICA_DRIFT: lambda: suspect("update", [EXPECTED, EXPECTED + 1e-7], EXPECTED),
    Cause.NOT_FINITE: lambda: suspect("activation", [EXPECTED, EXPECTED * torch.nan], EXPECTED),
    Cause.ALL_ZERO: lambda: suspect("activation", [EXPECTED, EXPECTED * (BIAS.cumsum(0) > 4)], EXPECTED),
    Cause.BIT_FLIPPED: lambda: weight(flipped()),
    Cause.DTYPE_ROUNDED: lambda: suspect("activation", [EXPECTED.bfloat16().double()] * 2, EXPECTED, observed=1e-3),
    Cause.TRANSPOSED: lambda: weight(EXPECTED[:, :4].t().contiguous(), EXPECTED[:, :4].contiguous()),
    Cause.GATE_UP_EXCHANGED: lambda: weight(
        EXPECTED.roll(len(EXPECTED) // 2, 0), where={"parameter": "mlp.gate_up.weight"}
    ),
    Cause.KEY_VALUE_EXCHANGED: lambda: weight(EXPECTED[[0, 1, 3, 2]], where={"parameter": "attn.qkv.weight"}),
    Cause.ROTARY_LAYOUT: lambda: weight(HEADS.reshape(2, 2, 2, -1).transpose(1, 2).reshape_as(HEADS), HEADS),
    Cause.OFFSET_BY_CONSTANT: lambda: weight(EXPECTED[:, 0] - 1, EXPECTED[:, 0]),
    Cause.MASTERS_STALE: lambda: suspect("update", [OTHER, EXPECTED], EXPECTED, step=StepFacts(unlike_masters_on=(0,))),
    Cause.STALE_WEIGHT: lambda: suspect("update", [OTHER, EXPECTED], EXPECTED, step=StepFacts(before=(OTHER, OTHER))),
    Cause.TIED_WEIGHT_UNTIED: lambda: suspect(
        "gradient", [EXPECTED - OTHER] * 2, EXPECTED, gradient=GradientFacts(untied={"head": (OTHER, OTHER)})
    ),
}


# Of causes that only runs have, tests/runs/test_wrong_loops.py has the loops; of those of checkpoints alone,
# tests/numerics/exact and tests/checkpoints have the tests; tests/numerics/checks/test_resume.py has those of resumed
# trainings, test_initialisation.py those of models made from scratch.
ELSEWHERE = ("runs.", "numerics.exact", "numerics.checks.resume", "numerics.checks.initialisation", "checkpoints")
OF_OTHERS = {cause for cause in Cause if all(module.startswith(ELSEWHERE) for module in cause.diagnosed_in)}


@pytest.mark.parametrize(
    "cause",
    [cause for cause in Cause if cause.slug not in OF_BATCHES and cause not in OF_NAMES and cause not in OF_OTHERS],
)
def test_a_cause_is_named_where_its_test_holds(cause: Cause) -> None:
    """A new cause needs an example here."""
    found = explain(EXAMPLES[cause]())
    assert found is not None
    assert found.cause is cause
    assert found.residual < 1e-2 if cause is Cause.DTYPE_ROUNDED else found.residual < 1e-12


@pytest.mark.parametrize("kind", ["activation", "input_gradient", "gradient", "update"])
def test_what_is_not_a_number_is_evidence_for_nothing_else(kind: str) -> None:
    stale = StepFacts(before=(OTHER, OTHER))
    found = explain(suspect(kind, [EXPECTED * torch.nan, EXPECTED], EXPECTED, step=stale))  # type: ignore[arg-type]
    assert found is not None
    assert found.cause is Cause.NOT_FINITE
    assert explain(suspect(kind, [EXPECTED * torch.nan, OTHER], EXPECTED, step=stale)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", [kind for kind in TESTS if kind not in ("group", "sharding", "lost", "norm", "replica")]
)
def test_a_tensor_that_is_merely_wrong_has_no_cause(kind: str) -> None:
    assert explain(suspect(kind, [OTHER, OTHER + 1], EXPECTED)) is None  # type: ignore[arg-type]


def test_a_loss_over_gathered_logits_is_reduced_once_more() -> None:
    loss = torch.tensor(2.0, dtype=torch.float64)
    facts = LossFacts(2.0, (2.0 + log(2),) * 2)
    assert cause_of(suspect("activation", [loss + log(2)] * 2, loss, loss=facts)) is Cause.DUPLICATE_REDUCE


def test_the_same_collectives_over_other_ranks_are_a_wrong_group() -> None:
    over_tp, over_dp = ((("all_reduce", ranks),) for ranks in ((0, 1), (0, 2)))
    parts = [EXPECTED + 1, EXPECTED + 2]
    elsewhere = SiblingCollectives(over_dp, over_tp, "in layers.1")
    found = explain(suspect("activation", parts, EXPECTED, collectives=elsewhere))
    assert found is not None
    assert found.cause is Cause.WRONG_GROUP
    nothing = SiblingCollectives((), over_tp, "in layers.1")
    assert explain(suspect("activation", parts, EXPECTED, collectives=nothing)) is None
