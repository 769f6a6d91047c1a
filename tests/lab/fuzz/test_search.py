"""Examples are drawn, run once, and shrunk; no world is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tpcheck.lab.fuzz.results import Outcome, SearchResult
from tpcheck.lab.fuzz.search import Limits, search

Pair = tuple[int, bool]
PAIRS = st.tuples(st.integers(0, 1000), st.booleans())


def outcome(status: str, kind: str = "", pair: Pair | None = None) -> Outcome:
    return Outcome(status, kind, command=f"run {pair}")  # type: ignore[arg-type]


def searched(run: Callable[[Pair], Outcome], **limits: float) -> SearchResult:
    return search(PAIRS, run, Limits(**{"examples": 100, **limits}), lambda outcome, *, shrinking: None)  # type: ignore[arg-type]


def fails_from_100(pair: Pair) -> Outcome:
    return outcome("failed", "large", pair) if pair[0] >= 100 else outcome("passed", pair=pair)


def test_a_failure_is_shrunk_to_the_smallest() -> None:
    found = searched(fails_from_100).found
    assert [one.outcome.command for one in found] == ["run (100, False)"]
    assert found[0].is_reproducible


def test_a_search_without_failures_passes() -> None:
    result = searched(lambda pair: outcome("passed"))
    assert (result.verdict, result.found, result.count("passed")) == ("passed", (), result.num_ran)


def test_each_kind_is_found_and_shrunk_by_itself() -> None:
    def run(pair: Pair) -> Outcome:
        return outcome("error", "odd", pair) if pair[0] > 10 and pair[0] % 2 else fails_from_100(pair)

    commands = {one.outcome.kind: one.outcome.command for one in searched(run).found}
    assert commands == {"odd": "run (11, False)", "large": "run (100, False)"}


@pytest.mark.parametrize("status", ["known", "refused"])
def test_a_known_or_refused_example_is_no_finding(status: str) -> None:
    result = searched(lambda pair: outcome(status, "bug") if pair[0] >= 100 else outcome("passed"))
    assert result.verdict == "passed"
    assert result.count(status)  # type: ignore[arg-type]


def test_a_search_whose_examples_are_all_refused_has_not_passed() -> None:
    assert searched(lambda pair: outcome("refused")).verdict == "skipped"


def test_equal_seeds_draw_equal_examples_and_other_seeds_draw_others() -> None:
    def commands(seed: int) -> list[str]:
        return [one.command for one in searched(lambda pair: outcome("passed", pair=pair), seed=seed).outcomes]

    assert commands(3) == commands(3)
    assert commands(3) != commands(4)


def test_only_the_smallest_example_runs_twice() -> None:
    ran: list[Pair] = []

    def run(pair: Pair) -> Outcome:
        ran.append(pair)
        return fails_from_100(pair)

    searched(run)
    assert [pair for pair in set(ran) if ran.count(pair) > 1] == [(100, False)]


def test_shrinking_ends_at_its_time_limit_and_is_marked() -> None:
    result = searched(fails_from_100, shrink_seconds=0)
    assert result.cut_short
    assert result.verdict == "failed"


def test_a_failure_that_is_not_reproducible_is_marked() -> None:
    times: dict[Pair, int] = {}

    def once(pair: Pair) -> Outcome:
        times[pair] = times.get(pair, 0) + 1
        return fails_from_100(pair) if times[pair] == 1 else outcome("passed", pair=pair)

    assert not searched(once).found[0].is_reproducible


def test_an_interrupt_keeps_the_results_so_far() -> None:
    def run(pair: Pair) -> Outcome:
        if 100 <= pair[0] < 120:
            raise KeyboardInterrupt
        return fails_from_100(pair)

    result = searched(run)
    assert result.interrupted
    assert result.verdict in ("failed", "passed")
    assert result.num_ran == len(result.outcomes)


def test_an_error_of_tpcheck_itself_is_not_swallowed() -> None:
    def broken(pair: Pair) -> Outcome:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        searched(broken)


def test_no_files_are_left_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    searched(fails_from_100)
    assert list(tmp_path.iterdir()) == []


def test_what_was_refused_before_a_failure_does_not_count_after_it() -> None:
    ran: list[Pair] = []

    def run(pair: Pair) -> Outcome:
        if pair[0] % 2:
            return outcome("refused")
        ran.append(pair)
        return outcome("failed" if len(ran) == 30 else "passed", pair=pair)

    assert searched(run, examples=60).num_ran > 45
