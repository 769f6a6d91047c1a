"""A test that cannot run on ranks fails at once, with what to do instead."""

from __future__ import annotations

import pytest

from tests.pytest_plugin.conftest import Run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tp=0", "UsageError in pytest.mark.tpcheck: tp=0: expected a positive integer"),
        ("", "*tp=None: expected the size of an axis, such as tp=2"),
        ("2", "*pytest.mark.tpcheck=(2,): expected named arguments, such as tp=2"),
        ("tp=2, zp=2", "*zp=2: expected one of tp, dp, *timeout, device, backend, seed"),
        ("tp=2, timeout=-1", "*timeout=-1: expected seconds above 0, or None for no limit"),
        ("tp=2, device='tpu'", "*device='tpu': expected one of cpu, cuda"),
        ("tp=2, backend='mpi'", "*backend='mpi': expected one of gloo, nccl"),
        ("tp=2, seed='x'", "*seed='x': expected an integer from 0*"),
    ],
)
def test_a_wrong_marker_is_an_error_at_setup(run: Run, arguments: str, message: str) -> None:
    result = run(f"@pytest.mark.tpcheck({arguments})\ndef test_marked(tp_rank): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])


def test_closer_markers_override_others_and_options(run: Run) -> None:
    source = """
        pytestmark = pytest.mark.tpcheck(tp=4, timeout=30)

        @pytest.mark.tpcheck(tp=2)
        class TestTwo:
            def test_of_the_class(self, tp_rank):
                assert tp_rank.world_size == 2

            @pytest.mark.tpcheck(tp=1)
            def test_of_the_method(self, tp_rank):
                assert tp_rank.world_size == 1

        @pytest.mark.tpcheck(tp=2, dp=2)
        class TestFour:
            @pytest.mark.tpcheck(tp=1)
            def test_merges_argument_by_argument(self, tp_rank):
                assert (tp_rank.topology.tp, tp_rank.topology.dp) == (1, 2)

        @pytest.mark.parametrize("size", [pytest.param(3, marks=pytest.mark.tpcheck(tp=3))])
        def test_of_the_parameter(tp_rank, size):
            assert tp_rank.world_size == size
    """
    run(source, "--tpcheck-backend=gloo", "--tpcheck-device=cpu").assert_outcomes(passed=4)


def test_tests_that_cannot_run_on_ranks_are_errors(run: Run) -> None:
    source = """
        import unittest

        def test_unmarked(tp_rank):
            pass

        @pytest.mark.tpcheck(tp=2)
        async def test_async(tp_rank):
            pass

        @pytest.mark.tpcheck(tp=2)
        class TestUnit(unittest.TestCase):
            def test_unit(self):
                pass

        @pytest.fixture
        def too_early(tp_rank):
            return tp_rank.rank

        @pytest.mark.tpcheck(tp=2)
        def test_too_early(tp_rank, too_early):
            pass
    """
    result = run(source)
    result.assert_outcomes(errors=4)
    result.stdout.fnmatch_lines_random(
        [
            "tp_rank exists only on the ranks of a world: mark the test with `@pytest.mark.tpcheck(tp=2)`",
            "async tests do not run on ranks: *",
            "the marker `tpcheck` works on test functions *",
            "*tp_rank.rank=<tp_rank>: expected use inside the body *",
        ]
    )


def test_fixtures_that_cannot_be_sent_to_ranks_are_named_with_the_reason(run: Run) -> None:
    source = """
        import threading

        @pytest.fixture
        def lock():
            return threading.Lock()

        @pytest.fixture
        def contains_the_rank(tp_rank):
            return [tp_rank]

        pytestmark = pytest.mark.tpcheck(tp=2)

        def test_lock(tp_rank, tmp_path, lock): pass
        def test_capsys(capsys): pass
        def test_monkeypatch(monkeypatch): pass
        def test_contains_the_rank(contains_the_rank): pass

        class TestAttributes:
            def setup_method(self):
                self.lock = threading.Lock()

            def test_attribute(self): pass
    """
    result = run(source)
    result.assert_outcomes(failed=5)
    result.stdout.fnmatch_lines_random(
        [
            "UsageError: lock=<unlocked *>: expected an argument or fixture that pickles*_thread.lock*",
            "UsageError: capsys=*: expected a fixture that can be sent to the ranks: it sees the output of*",
            "UsageError: monkeypatch=*: it changes pytest's process; make changes inside the body*",
            "UsageError: contains_the_rank=*: expected an argument of the test itself, not part of another value)",
            "UsageError: self.lock=<unlocked *>: expected an attribute that pickles*",
        ]
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tpcheck-timeout=-1", "*tpcheck_timeout=-1.0: expected seconds, or 0 for no limit"),
        ("-otpcheck_timeout=soon", "*tpcheck_timeout='soon': expected seconds, or 0 for no limit"),
        ("-otpcheck_device=tpu", "*tpcheck_device='tpu': expected one of cpu, cuda"),
        ("--tpcheck-backend=mpi", "*--tpcheck-backend: invalid choice: 'mpi' (choose from *gloo*nccl*)"),
    ],
)
def test_wrong_options_are_refused_before_any_test(run: Run, option: str, message: str) -> None:
    result = run("def test_plain(): pass", option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
