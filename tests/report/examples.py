"""Findings and verdicts as runs make them, for the tests of every text."""

from __future__ import annotations

from math import inf, nan

from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict

SUBJECT = {
    "family": "qwen3",
    "backend": "deepspeed",
    "tp": 2,
    "dp": 1,
    "zero_stage": 0,
    "dtype": "float64",
    "steps": 2,
    "seed": 0,
}
VERSIONS = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}

GRADIENT = Finding(
    check="gradients_match_reference",
    where={
        "phase": "backward",
        "step": 0,
        "module": "model.layers.0.self_attn.q_norm",
        "parameter": "model.layers.0.self_attn.q_norm.weight",
        "ranks": [0, 1],
    },
    observed=0.82,
    allowed=4.2e-14,
    cause="partial_gradient_on_replica",
    evidence={
        "largest": 0.066,
        "largest_at": [6],
        "replays": 8,
        "dtype": "float64",
        "first_of": 4,
        "inputs_agree": True,
        "cause_error": 1.8e-15,
    },
    again="tpcheck verify qwen3 --tp 2 --ignore-plan",
)
OUTPUT = Finding(
    check="outputs_match_reference",
    where={"phase": "forward", "step": 1, "module": "", "field": "loss", "ranks": [1]},
    observed=inf,
    allowed=1e-13,
    cause="not_finite",
    evidence={"largest": nan, "inputs_agree": False, "dtype": "bfloat16", "replays": 1},
)
NORM = Finding(
    check="gradient_norm_matches_reference",
    where={"phase": "update", "step": 1, "ranks": [1]},
    observed=0.5,
    allowed=1e-13,
    evidence={"norm_actual": [1.0, 1.5], "norm_expected": 1.0, "dtype": "float64", "replays": 8},
)
REPLICAS = Finding(
    check="replicas_agree",
    where={
        "phase": "update",
        "step": 0,
        "parameter": "q.weight",
        "field": "gradient q.weight over tp",
        "ranks": [0, 1],
    },
    observed=2.0,
    allowed=0.0,
    cause="replica_drift",
    evidence={
        "count_differing": 2,
        "gradients": 1,
        "parameters": 1,
        "also": [{"kind": "parameter", "name": "q.weight"}],
    },
)
WEIGHT = Finding(
    check="weights_match_reference",
    where={"phase": "start", "parameter": "lm_head.weight", "ranks": list(range(10)), "dp_rank": 1},
    observed=1.0,
    allowed=0.0,
    evidence={"count_differing": 1, "count_total": 128, "largest": 0.5, "largest_at": [0, 3]},
)
SHAPE = Finding(
    check="weights_match_reference",
    where={"phase": "start", "parameter": "lm_head.weight", "index": 3},
    observed=1.0,
    allowed=0.0,
    evidence={"shape_actual": (32, 64), "shape_expected": (64, 64), "note": "rank 0 alone holds it"},
)
GROUPS = Finding(
    check="groups_match_topology",
    where={"phase": "start", "field": "tp group", "ranks": [2]},
    observed=1.0,
    allowed=0.0,
    cause="wrong_group",
    evidence={"live": [[0, 2]], "declared": [[2, 3]]},
)

PASSED = Verdict(
    "passed",
    SUBJECT,
    VERSIONS,
    checks=(
        CheckResult("groups_match_topology", 4, 0.0),
        CheckResult("outputs_match_reference", 96, 0.1134, "step 1 model.layers.0.mlp"),
        CheckResult("gradients_match_reference", 46, 2.5e-5, "step 0 model.norm.weight"),
        CheckResult("gradient_norm_matches_reference", 0, 0.0),
    ),
    coverage=Coverage(
        146,
        151,
        {
            "a": "it has no output",
            "b": "it has no output",
            "c": "its placement is not known",
            "d": "it has no output",
            "e": "it has no output",
        },
    ),
    seconds=6.123,
)
FAILED = Verdict(
    "failed",
    {**SUBJECT, "dp": 2, "zero_stage": 1, "settings": {"qk_layernorm": True, "head_dim": 8}, "ignore_plan": True},
    VERSIONS,
    findings=(GRADIENT, *[NORM] * 5),
    checks=(
        CheckResult("outputs_match_reference", 96, 0.1),
        CheckResult("gradients_match_reference", 46, 2.0e12, "model.layers.0.self_attn.q_norm.weight"),
        CheckResult("gradient_norm_matches_reference", 2, inf, "gradient norm"),
    ),
    coverage=Coverage(144, 144),
    seconds=7.0,
)
ERROR = Verdict(
    "error", {**SUBJECT, "family": "phi3"}, VERSIONS, message="ValueError: style\n  not supported\x1b[0m\n", seconds=3
)
SKIPPED = Verdict("skipped", {**SUBJECT, "family": "llama"}, {}, message="two ranks need two GPUs")
