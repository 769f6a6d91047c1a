"""Results of faults and clean controls, one of each kind."""

from __future__ import annotations

from math import inf

from tpcheck.lab.faults.results import CONTROL, FaultResult, Score

RIGHT = FaultResult(
    "reduce_skipped",
    "forward collectives",
    "a layer returns its rank's term instead of the sum",
    "failed",
    checks=("outputs_match_reference", "replicas_agree"),
    place="model.layers.0.mlp.down_proj",
    true_places=("model.layers.0.mlp.down_proj",),
    place_is_right=True,
    cause="missing_reduce",
    true_causes=("missing_reduce",),
    cause_is_right=True,
    margin=5.7e13,
    seconds=1.31,
    link="https://github.com/example/repo/issues/1",
)
ELSEWHERE = FaultResult(
    "slopes_of_another_rank",
    "layout",
    "a rank has the slopes of another",
    "failed",
    checks=("outputs_match_reference",),
    place="model.norm",
    true_places=("model.a", "model.b", "model.c", "model.d"),
    true_causes=("head_mapping_wrong", None),
    cause="bias_added_per_rank",
    margin=2e4,
    seconds=1.5,
)
EXACT = FaultResult(
    "saved_one_bit",
    "checkpoint",
    "one bit differs from the reference",
    "failed",
    checks=("checkpoint_matches_reference",),
    place="model.x",
    true_places=("model.x",),
    place_is_right=True,
    true_causes=(None,),
    cause_is_right=True,
    margin=inf,
    dtype="any",
)
MISSED = FaultResult(
    "quiet", "layout", "a fault that <b>nobody</b> sees", "passed", margin=0.3, true_causes=("wrong_group",)
)
CRASHED = FaultResult("loud", "layout", "a fault that crashes", "error", message="RuntimeError: <boom>\nat line 3")
HIDDEN = FaultResult("small", "precision", "too small for this dtype", "passed", margin=0.4, must_show=False)
CLEAN = FaultResult("llama tp=2 dp=1 zero=0", CONTROL, "no fault is injected", "passed", margin=0.113, seconds=1.2)
FALSE_POSITIVE = FaultResult("opt tp=2 dp=1 zero=0", CONTROL, "no fault is injected", "failed", margin=3.0)

GOOD = Score.of([RIGHT, EXACT, HIDDEN, CLEAN])
BAD = Score.of([RIGHT, ELSEWHERE, EXACT, MISSED, CRASHED, HIDDEN, CLEAN, FALSE_POSITIVE])
