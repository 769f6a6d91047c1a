"""Searches that have ended in each way."""

from __future__ import annotations

from dataclasses import replace

from tests.report.examples import ERROR as ERROR_VERDICT
from tests.report.examples import FAILED as FAILED_VERDICT
from tpcheck.lab.fuzz.results import Outcome, SearchResult, ShrunkFailure

COMMAND = "tpcheck verify qwen3 --tp 2 --ignore-plan"
SUBJECT = {"family": "qwen3", "backend": "deepspeed", "examples": 5, "seed": 0}
FINE = Outcome("passed", command="tpcheck verify qwen3 --tp 2")
WRONG = Outcome("failed", "failed gradients_match_reference", "a gradient is wrong", COMMAND, FAILED_VERDICT)
CRASH = Outcome("error", "error forward", "ValueError: style", "tpcheck verify qwen3 --tp 4", ERROR_VERDICT)
NO = Outcome("refused", reason="N heads do not fit")
KNOWN = Outcome("known", "deepspeed-bf16-norm", "the norm is wrong", "tpcheck verify qwen3 --tp 2 --dtype bfloat16")

PASSED = SearchResult(SUBJECT, (FINE, NO, KNOWN, FINE), seconds=12.3)
FAILED = SearchResult(
    SUBJECT,
    (FINE, NO, WRONG, NO),
    (ShrunkFailure(WRONG, WRONG, "tpcheck verify qwen3 --tp 4 --dp 2 --batch 3x7 --ignore-plan"),),
    num_shrinking=9,
    seconds=20.0,
)
ERROR = SearchResult(SUBJECT, (CRASH,), (ShrunkFailure(CRASH, FINE, CRASH.command),), cut_short=True)
REFUSED = SearchResult(SUBJECT, (NO, NO))
INTERRUPTED = SearchResult(SUBJECT, (FINE,), interrupted=True)

TRIED = Outcome(
    "failed",
    "LinearLayer gradient of the input",
    "LinearLayer: gradient of the input is off by 1.0e+00 on ranks [1]; missing_reduce",
    'tpcheck fuzz --layers --trial \'{"layer": "LinearLayer", "inputs": 2}\'',
    {"tensor": "gradient of the input", "cause": "missing_reduce"},
)
LAYER = SearchResult(
    {"layer": "LinearLayer", "backend": "deepspeed"}, (FINE, TRIED), (ShrunkFailure(TRIED, TRIED, TRIED.command),)
)
NOT_TRIED = replace(LAYER, subject={"layer": "LmHead"}, outcomes=(Outcome("refused", reason="no gradient"),), found=())
