"""Which replicas of two runs were given the same samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.runs.hand_made import run
from tpcheck.core.errors import UsageError
from tpcheck.runs.comparing.alignment import Run, SharedSamples, aligned_steps, shared_samples


def samples(*replicas: str) -> list[Counter[str]]:
    return [Counter(replica) for replica in replicas]


@pytest.mark.parametrize(
    ("actual", "expected", "shared"),
    [
        (["abcd"], ["abcd"], SharedSamples((0,), (0,), True)),
        (["ab", "cd"], ["dcba"], SharedSamples((0, 1), (0,), True)),
        (["ab", "cd"], ["ac", "bd"], SharedSamples((0, 1), (0, 1), True)),
        (["ab", "ab"], ["ab"], SharedSamples((0, 1), (0,), True, 2, 1)),
        (["aab"], ["aab"], SharedSamples((0,), (0,), True)),
        (["ab", "cd"], ["ab"], SharedSamples((0,), (0,), False)),
        (["ab"], ["cd", "ab"], SharedSamples((0,), (1,), False)),
        (["ab", "cd"], ["xy", "ab"], SharedSamples((0,), (1,), False)),
        (["ab"], ["cd"], None),
        (["ab"], ["bc"], None),
        (["aab"], ["abb"], None),
    ],
)
def test_replicas_with_the_same_samples_are_compared(
    actual: list[str], expected: list[str], shared: SharedSamples | None
) -> None:
    found, note = shared_samples(samples(*actual), samples(*expected))
    assert found == shared
    assert bool(note) == (shared is None or not shared.is_whole_step)


def test_a_share_of_the_samples_is_counted() -> None:
    assert "share 1 of 2 samples" in shared_samples(samples("ab"), samples("bc"))[1]


def test_a_skipped_step_is_not_taken_for_the_one_that_followed_it() -> None:
    actual = run(tp=2)
    with_skip = tuple(
        replace(rank, steps=(replace(rank.steps[1], number=0, has_update=False, is_skipped=True), *rank.steps))
        for rank in actual
    )
    first, _ = aligned_steps(Run.of("actual", with_skip), Run.of("expected", run()))
    assert all(step.has_update for step in first.actual.values())


def test_a_tp_group_without_all_ranks_is_refused() -> None:
    with pytest.raises(UsageError, match="folders of all nodes"):
        Run.of("half", run(tp=2)[:1])


def test_ranks_without_a_trace_are_known() -> None:
    assert Run.of("some", run(tp=2, dp=2)[:3]).missing_ranks == (3,)
