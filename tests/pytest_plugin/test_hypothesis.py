"""Hypothesis draws and shrinks in pytest's process, and every example runs on all ranks."""

from __future__ import annotations

from tests.pytest_plugin.conftest import Run

HEADER = """
    from hypothesis import assume, given, settings, strategies as st
    settings.register_profile("quiet", database=None, deadline=None, derandomize=True)
    settings.load_profile("quiet")
"""


def test_every_rank_gets_the_same_example_and_one_world_serves_all(run: Run) -> None:
    source = """
    import os, random

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory):
        return tmp_path_factory.mktemp("pids")

    @settings(max_examples=20)
    @given(width=st.integers(1, 8), data=st.lists(st.floats(), max_size=3))
    @pytest.mark.tpcheck(tp=2)
    def test_any_width(tp_rank, folder, width, data):
        assert len(set(map(repr, tp_rank.gather((width, data))))) == 1
        assert len(set(tp_rank.gather(random.random()))) == 2, "Hypothesis seeds only pytest's process"
        (folder / str(os.getpid())).touch()
        assert len(list(folder.iterdir())) <= 2

    class TestMethod:
        @settings(max_examples=5)
        @given(width=st.integers(1, 8))
        @pytest.mark.tpcheck(tp=2)
        def test_method(self, tp_rank, width):
            assert type(self) is TestMethod
            assert 1 <= width <= 8
    """
    run(HEADER + source).assert_outcomes(passed=2)
    run(HEADER + source, "--tpcheck-fresh").assert_outcomes(passed=1, failed=1)


def test_a_failing_example_is_shrunk(run: Run) -> None:
    source = """
    import torch

    @settings(max_examples=30)
    @given(st.integers(0, 30))
    @pytest.mark.parametrize("limit", [13])
    @pytest.mark.tpcheck(tp=2)
    def test_small(tp_rank, limit, width):
        torch.distributed.all_reduce(torch.ones(1))
        if tp_rank.rank == 1:
            assert width < limit

    @pytest.mark.xfail(raises=ZeroDivisionError, strict=True)
    @settings(max_examples=5)
    @given(st.integers(0, 1000))
    @pytest.mark.tpcheck(tp=2)
    def test_divides(tp_rank, width):
        1 // 0
    """
    result = run(HEADER + source)
    result.assert_outcomes(failed=1, xfailed=1)
    result.stdout.fnmatch_lines(
        [
            "tp_rank = <Rank 1 of 2: dp=0, tp=1>, limit = 13, width = 13",
            "E           assert 13 < 13",
            "E   *test_small(",
            "E   *width=13,*",
            "-* rank 1 of 2 raised; other ranks -*",
            "FAILED *test_small*assert 13 < 13",
        ]
    )
    result.stdout.no_fnmatch_line("*Explanation:*")


def test_two_failures_of_one_type_are_reported_separately(run: Run) -> None:
    source = """
    @given(st.sampled_from([0, 1]))
    @pytest.mark.tpcheck(tp=2)
    def test_two(tp_rank, width):
        assert width != 0
        assert width != 1
    """
    result = run(HEADER + source)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*Hypothesis found 2 distinct failures*", "*width=0,*", "*width=1,*", "-* rank ? of 2 raised; other ranks -*"]
    )


def test_assume_rejects_an_example_on_the_ranks(run: Run) -> None:
    source = """
    @settings(max_examples=5)
    @given(st.integers(0, 50))
    @pytest.mark.tpcheck(tp=2)
    def test_even(tp_rank, width):
        assume(width % 2 == 0)
        assert width % 2 == 0
    """
    run(HEADER + source).assert_outcomes(passed=1)


def test_drawing_inside_the_body_is_refused(run: Run) -> None:
    source = """
    @given(st.data())
    @pytest.mark.tpcheck(tp=2)
    def test_data(tp_rank, data):
        data.draw(st.integers())
    """
    result = run(HEADER + source)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*data=*Hypothesis draws in pytest's process only, so pass every strategy to @given*"])
