"""The words for what differs between batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tpcheck.core.causes import Cause
from tpcheck.core.findings import Finding
from tpcheck.report.findings import finding_lines
from tpcheck.report.words import as_text

SUBJECT = {"model": "batches of DataLoader", "tp": 2, "dp": 2, "groups_from": "deepspeed.utils.groups"}
PIXELS = Finding(
    check="batches_agree_within_tp",
    where={"step": 1, "field": "pixel_values", "ranks": [0, 1], "dp_rank": 0, "index": [2, 0, 5, 31]},
    observed=2841.0,
    allowed=0.0,
    cause="rng_differs_torch",
    evidence={
        "differs": "bits",
        "values": {"rank 0": 0.3137254901960784, "rank 1": 0.0},
        "count_differing": 2841,
        "count_total": 12288,
        "first_sample": 2,
        "samples_differing": 2,
        "samples_total": 4,
        "also": [],
        "where": "workers",
        "generators": ["worker0.torch"],
        "advice": Cause.RNG_DIFFERS_TORCH.advise({"generators": ["worker0.torch"], "where": "workers"}),
    },
)


def text(finding: Finding) -> str:
    return as_text(finding_lines(finding, SUBJECT))


def observed(check: str = "batches_agree_within_tp", amount: float = 1.0, ranks: Any = (1,), **evidence: Any) -> str:
    lines = text(Finding(check, {"step": 3, "field": "labels", "ranks": list(ranks)}, amount, 0.0, None, evidence))
    (line,) = [line for line in lines.splitlines() if line.startswith("  observed")]
    return line.removeprefix("  observed  ")


def test_a_mismatch_is_reported_from_the_field_to_the_fix() -> None:
    assert text(PIXELS) == (
        "batches_agree_within_tp  pixel_values\n"
        "  where     tp=2, dp=2, dp rank 0, step 1\n"
        "  observed  2841 of 12288 elements differ, in 2 of 4 samples, first at [2, 0, 5, 31] on ranks 0, 1\n"
        "  values    0.3137254901960784 on rank 0, 0.0 on rank 1\n"
        "  allowed   0 (this check is exact)\n"
        f"  cause     {line_of_cause()}\n"
        "  fix       Seed workers by dp_rank, not by rank: pass "
        "`generator=torch.Generator().manual_seed(seed + dp_rank)` to the loader, from which torch seeds each worker. "
        "A worker_init_fn that seeds calls `torch.manual_seed(seed + 1000 * dp_rank + worker_id)`.\n"
        "  evidence  where workers, generators [worker0.torch]\n"
    )


def line_of_cause() -> str:
    from tpcheck.core.causes import cause_text

    return cause_text("rng_differs_torch", None)


def test_the_mismatch_in_the_guide_is_one_that_reports_make() -> None:
    assert text(PIXELS) in (Path(__file__).parents[2] / "docs" / "guides" / "data-inconsistency.md").read_text()


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (
            {"differs": "dtype", "by_rank": {"rank 0": "torch.int64", "rank 1": "torch.int32"}},
            "dtype torch.int64 on rank 0, torch.int32 on rank 1; differs on rank 1",
        ),
        (
            {"differs": "shape", "by_rank": {"rank 0": (4, 8), "rank 1": (4, 7)}},
            "shape [4, 8] on rank 0, [4, 7] on rank 1; differs on rank 1",
        ),
        (
            {"differs": "shape", "by_rank": {f"rank {rank}": [rank] for rank in range(6)}},
            "shape [0] on rank 0, [1] on rank 1, [2] on rank 2, [3] on rank 3 and 2 more; differs on rank 1",
        ),
        ({"differs": "structure", "missing_on": [1]}, "missing on rank 1; differs on rank 1"),
        ({"differs": "bits"}, "differs on rank 1"),
        (
            {"differs": "bits", "count_differing": 1, "count_total": 1, "samples_total": 1},
            "1 of 1 element differs on rank 1",
        ),
        (
            {"differs": "length", "batches": {"rank 0": 3, "rank 1": 2}, "ended": ["rank 1"]},
            "batches: 3 or more on rank 0, 2 on rank 1",
        ),
    ],
)
def test_every_kind_of_difference_has_its_phrase(evidence: dict[str, Any], expected: str) -> None:
    assert observed(**evidence) == expected


def test_replicas_with_the_same_samples_have_them_in_common() -> None:
    text_of_replicas = observed("batches_differ_across_dp", 4.0, (0, 1, 2, 3), order="another order", replicas=[0, 1])
    assert text_of_replicas == "4 samples in common, in another order on ranks 0, 1, 2, 3"
