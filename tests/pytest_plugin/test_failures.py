"""A failing rank is reported like a failing test, with what the other ranks were doing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from tests.pytest_plugin.conftest import Run

ASSERTS_ON_RANK_1 = """
    import torch

    def check(values):
        assert values == [1, 2, 3]

    @pytest.mark.tpcheck(tp=2)
    def test_sum(tp_rank):
        print("here is", tp_rank.rank)
        if tp_rank.rank == 1:
            check([1, 2, 4])
        torch.distributed.all_reduce(torch.ones(1))
"""


def test_the_traceback_and_introspection_of_the_rank_are_shown(run: Run) -> None:
    result = run(ASSERTS_ON_RANK_1, "-ra")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "_* test_sum _*",
            "tp_rank = <Rank 1 of 2: dp=0, tp=1>",
            ">   *check([[]1, 2, 4])",
            ">       assert values == [[]1, 2, 3]",
            "E       assert [[]1, 2, 4] == [[]1, 2, 3]",
            "E *At index 2 diff: 4 != 3",
            "test_it.py:7: AssertionError",
            "-* rank 1 of 2 raised; other ranks -*",
            "rank 0: stopped while waiting in all_reduce, at *.py:14 in test_sum",
            "-* Captured stdout rank 0 -*",
            "here is 0",
            "-* Captured stdout rank 1 -*",
            "here is 1",
            "FAILED *::test_sum - assert [[]1, 2, 4] == [[]1, 2, 3]",
        ]
    )
    result.stdout.no_fnmatch_line("*tpcheck/pytest_plugin*")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--tb=short", "test_it.py:13: in test_sum"),
        ("--tb=line", "*test_it.py:7: assert [[]1, 2, 4] == [[]1, 2, 3]"),
        ("--tb=native", "AssertionError: assert [[]1, 2, 4] == [[]1, 2, 3]"),
        ("-l", "tp_rank    = <Rank 1 of 2: dp=0, tp=1>"),
        ("-vv", "E *Full diff:*"),
        ("--assert=plain", "E *AssertionError"),
        ("--color=yes", "*\x1b[[]1m\x1b[[]31mE *assert*"),
    ],
)
def test_options_of_pytest_apply_to_the_rank(run: Run, option: str, line: str) -> None:
    run(ASSERTS_ON_RANK_1, option).stdout.fnmatch_lines([line])


def test_junit_contains_message_and_other_ranks(run: Run, pytester: pytest.Pytester) -> None:
    run(ASSERTS_ON_RANK_1, "--junitxml=out.xml")
    case = ElementTree.parse(pytester.path / "out.xml").getroot().find(".//testcase")
    assert case is not None
    failure = case.find("failure")
    assert failure is not None
    assert failure.attrib["message"].startswith("assert [1, 2, 4] == [1, 2, 3]")
    assert "rank 0: stopped while waiting in all_reduce" in (failure.text or "")


def test_conftests_explain_comparisons_on_ranks_too(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeconftest("def pytest_assertrepr_compare(op, left, right):\n    return ['explained by the conftest']")
    run(ASSERTS_ON_RANK_1).stdout.fnmatch_lines(["E *assert explained by the conftest"])


def test_a_rank_that_dies_or_hangs_is_reported_with_the_other_ranks(run: Run) -> None:
    source = """
        import os, time
        import torch

        @pytest.mark.tpcheck(tp=2)
        def test_dies(tp_rank):
            if tp_rank.rank == 1:
                os._exit(3)
            torch.distributed.all_reduce(torch.ones(1))

        @pytest.mark.tpcheck(tp=2, timeout=2)
        def test_hangs(tp_rank):
            if tp_rank.rank == 1:
                time.sleep(100)
            torch.distributed.all_reduce(torch.ones(1))

        @pytest.mark.tpcheck(tp=2)
        def test_the_session_goes_on(tp_rank):
            pass
    """
    result = run(source)
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "rank 1 of 2 died: exited with code 3 before it answered",
            "rank 1 of 2 hung: no answer within 2 s, not in a collective, at *.py:16 in test_hangs",
            "rank 0: hung waiting in all_reduce, at *.py:17 in test_hangs",
            "FAILED *::test_dies - *RankFailure: rank 1 of 2 d*",  # cut at 80 columns
        ]
    )


def test_skip_and_xfail_work_inside_a_rank_and_name_it(run: Run) -> None:
    source = """
        import torch

        @pytest.mark.tpcheck(tp=2)
        def test_skips_on_one(tp_rank):
            if tp_rank.rank == 1:
                pytest.skip("nothing to do")
            torch.distributed.all_reduce(torch.ones(1))

        @pytest.mark.tpcheck(tp=2)
        def test_skips_on_all(tp_rank):
            pytest.importorskip("there_is_no_such_module")

        @pytest.mark.tpcheck(tp=2)
        def test_xfails(tp_rank):
            if tp_rank.rank == 0:
                pytest.xfail("known")
            torch.distributed.all_reduce(torch.ones(1))

        @pytest.mark.tpcheck(tp=2)
        def test_fails_beside_a_skip(tp_rank):
            if tp_rank.rank == 0:
                pytest.skip("nothing to do here")
            raise ValueError("this decides")
    """
    result = run(source, "-rxsf")
    result.assert_outcomes(skipped=2, xfailed=1, failed=1)
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED [[]1] *.py:9: nothing to do (rank 1)",
            "SKIPPED [[]1] *there_is_no_such_module* (*rank*)",
            "XFAIL *test_xfails*known (rank 0)",
            "E *ValueError: this decides",
            "-* rank 1 of 2 raised; other ranks -*",
            "rank 0: *rais*",  # Skipped, or was about to when the grace ended
        ]
    )
    run(source, "--runxfail", "-k", "xfails").assert_outcomes(passed=1)


def test_xfail_marks_see_the_type_that_the_rank_raised(run: Run) -> None:
    source = """
        class TwoArguments(Exception):
            def __init__(self, first, second):
                super().__init__(f"{first} and {second}")

        @pytest.mark.xfail(raises=ValueError, strict=True)
        @pytest.mark.tpcheck(tp=2)
        def test_expected(tp_rank):
            raise ValueError

        @pytest.mark.xfail(raises=TwoArguments, strict=True)
        @pytest.mark.tpcheck(tp=2)
        def test_does_not_pickle_by_itself(tp_rank):
            raise TwoArguments(1, 2)

        @pytest.mark.xfail(raises=ValueError)
        @pytest.mark.tpcheck(tp=2)
        def test_another(tp_rank):
            raise TwoArguments(1, 2)

        @pytest.mark.xfail(strict=True)
        @pytest.mark.tpcheck(tp=2)
        def test_passes(tp_rank):
            pass

        @pytest.mark.tpcheck(tp=2)
        def test_fails_without_traceback(tp_rank):
            pytest.fail("in one line", pytrace=False)
    """
    result = run(source)
    result.assert_outcomes(xfailed=2, failed=3)
    result.stdout.fnmatch_lines(["E *TwoArguments: 1 and 2", "[[]XPASS(strict)]*", "in one line"])


def test_a_module_that_ranks_cannot_import_fails_with_the_import_error(run: Run) -> None:
    source = """
        import os

        if "RANK" in os.environ:
            raise RuntimeError("not on ranks")

        @pytest.mark.tpcheck(tp=2)
        def test_never_starts(tp_rank):
            pass
    """
    result = run(source)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *RuntimeError: not on ranks"])


def test_output_of_passing_ranks_is_captured_and_shown_on_request(run: Run) -> None:
    source = """
        @pytest.mark.tpcheck(tp=2)
        def test_prints(tp_rank):
            print("printed by", tp_rank.rank)
    """
    run(source, "-rP").stdout.fnmatch_lines(["-* Captured stdout rank 1 -*", "printed by 1"])
    result = run(source)
    result.stdout.no_fnmatch_line("*printed by*")
