"""The worlds of a session: a test may start its own, they start when needed, and several run at a time under xdist."""

from __future__ import annotations

import pytest

from tests.pytest_plugin.conftest import Run
from tpcheck.world import forkserver_client


def test_worlds_of_tp_spawn_end_with_the_test(run: Run) -> None:
    source = """
        import os, signal
        import tpcheck

        def pid_of(rank):
            return os.getpid()

        pids = []

        def test_two_worlds(tp_spawn):
            first, second = tp_spawn(tp=2, timeout=30), tp_spawn(dp=2, env={"OF_THE_TEST": "yes"})
            assert first.topology == tpcheck.Topology(tp=2)
            assert second.run(lambda rank: os.environ["OF_THE_TEST"]) == ("yes", "yes")
            pids.extend(first.run(pid_of) + second.run(pid_of))
            with pytest.raises(tpcheck.RankFailure, match="rank [01] of 2 raised ZeroDivisionError"):
                first.run(lambda rank: 1 / 0)

        def test_both_have_ended():
            assert len(set(pids)) == 4
            for pid in pids:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)

        def test_wrong(tp_spawn):
            with pytest.raises(tpcheck.UsageError, match="zp=2: expected one of tp, dp"):
                tp_spawn(zp=2)
    """
    run(source).assert_outcomes(passed=3)


def test_tp_spawn_runs_functions_of_the_test_module_with_assertion_introspection(run: Run) -> None:
    source = """
        class Own:
            pass

        def check(rank, own, limit):
            assert isinstance(own, Own)
            assert [rank.rank] == [limit]

        def test_check(tp_spawn):
            tp_spawn(tp=2).run(check, Own(), limit=2)
    """
    result = run(source, "--import-mode=importlib")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *RankFailure: rank ? of 2 raised AssertionError: assert *", "E *assert [[]?] == [[]2]"]
    )


def test_each_test_has_fresh_processes(run: Run) -> None:
    source = """
        import os
        left_behind = []

        @pytest.mark.tpcheck(tp=2)
        @pytest.mark.parametrize("number", [1, 2])
        def test_fresh(tp_rank, number):
            assert left_behind == []
            left_behind.append(number)
    """
    run(source).assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("source", "args", "expected"),
    [
        ("def test_plain(): pass", (), 0),
        ("@pytest.mark.tpcheck(tp=2)\ndef test_marked(): pass", ("--collect-only",), 0),
        ("@pytest.mark.tpcheck(tp=2)\ndef test_marked(): pytest.skip()", ("--deselect=test_it.py::test_marked",), 0),
        ("def test_spawns(tp_spawn): pass", (), 1),
        ("@pytest.mark.tpcheck(tp=2)\n@pytest.mark.skip\ndef test_marked(): pass", (), 1),
    ],
)
def test_the_forkserver_starts_only_if_a_test_needs_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, source: str, args: tuple[str, ...], expected: int
) -> None:
    started: list[str] = []

    class ForkserverClient:
        has_ended = False

        def __init__(self, device: str, preload: tuple[str, ...]) -> None:
            started.append(device)

    monkeypatch.setattr(forkserver_client, "_forkservers", {})
    monkeypatch.setattr(forkserver_client, "ForkserverClient", ForkserverClient)
    run(source, *args)
    assert started == ["cpu"] * expected


@pytest.mark.slow
def test_xdist_workers_run_worlds_at_the_same_time(run: Run, pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(
        """
        import os
        import pytest

        @pytest.mark.tpcheck(tp=2)
        @pytest.mark.parametrize("number", range(6))
        def test_many(tp_rank, number):
            import torch
            total = torch.ones(1)
            torch.distributed.all_reduce(total)
            assert int(total) == 2

        @pytest.mark.tpcheck(tp=2)
        def test_fails(tp_rank):
            print("here is", tp_rank.rank)
            assert tp_rank.rank == 0

        @pytest.mark.tpcheck(tp=2)
        def test_dies(tp_rank):
            os._exit(3)

        @pytest.mark.tpcheck(tp=2)
        def test_skips(tp_rank):
            pytest.skip("so")
        """
    )
    result = pytester.runpytest_subprocess("-n", "2", "--junitxml=out.xml")
    result.assert_outcomes(passed=6, failed=2, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "E *assert 1 == 0",
            "-* rank 1 of 2 raised; other ranks -*",
            "-* Captured stdout rank 1 -*",
            "here is 1",
            "rank ? of 2 died: exited with code 3 before it answered",
        ]
    )
