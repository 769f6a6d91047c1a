"""pytest that a launcher has started on every rank: shared tests run on these ranks, and rank 0 reports them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tpcheck.pytest_plugin.launched import Collected, describe_difference
from tpcheck.world.groups import reserve_port
from tpcheck.world.launched_world import Place
from tpcheck.world.requests import RankOrigin

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_", "PYTEST_", "GROUP_", "ROLE_")


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a machine that has neither transformers nor deepspeed, whose imports take seconds."""
    for name in ("transformers", "deepspeed"):
        package = tmp_path / "light" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('not in these tests')")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    light = {"PYTHONPATH": str(tmp_path / "light"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **light, "COLUMNS": "100"}


def write(folder: Path, source: str) -> Path:
    suite = folder / "suite"
    suite.mkdir()
    (suite / "pytest.ini").write_text("[pytest]\naddopts = -p tpcheck.pytest_plugin -p no:cacheprovider\n")
    (suite / "test_it.py").write_text(f"import os\nfrom pathlib import Path\n\nimport pytest\n\n{dedent(source)}")
    return suite


def start(command: str, suite: Path, environ: dict[str, str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command.split()],
        cwd=suite,
        env={**environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Return the exit code, stdout and stderr of each."""
    try:
        outputs = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def srun(suite: Path, environ: dict[str, str], *args: str) -> list[tuple[int, str, str]]:
    """Run pytest on two ranks with the variables of srun."""
    with reserve_port() as port:
        number = str(port.getsockname()[1])
    shared = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number}
    command = " ".join(("pytest", *args))
    return ends([start(command, suite, environ, **shared, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"])


def test_torchrun_runs_shared_tests_on_its_ranks_and_rank_0_reports(tmp_path: Path, environ: dict[str, str]) -> None:
    suite = write(
        tmp_path,
        """
        from hypothesis import given, strategies as st

        def note(name):
            with Path(name).open("a") as file:
                file.write(os.environ["RANK"])

        @pytest.fixture
        def controller():
            note("fixture")
            return os.getpid()

        @pytest.mark.tpcheck(tp=2)
        def test_sum(tp_rank, controller, tmp_path):
            import torch
            assert int(os.environ["RANK"]) == int(os.environ["LOCAL_RANK"]) == tp_rank.rank
            assert os.getpid() != controller
            drawn = tp_rank.gather(torch.rand(1).item())
            assert drawn[0] != drawn[1]
            (tmp_path / str(tp_rank.rank)).touch()
            torch.distributed.barrier()
            assert len(list(tmp_path.iterdir())) == 2

        def test_each():
            note("each")

        @pytest.mark.tpcheck(tp=2)
        def test_fails(tp_rank):
            import torch
            print("here is", tp_rank.rank)
            torch.distributed.barrier()
            if tp_rank.rank == 1:
                assert [1, 2] == [1, 3]
            torch.distributed.all_reduce(torch.ones(1))

        @pytest.mark.tpcheck(tp=2)
        def test_dies(tp_rank):
            if tp_rank.rank == 1:
                os._exit(3)

        @pytest.mark.tpcheck(tp=2, timeout=2)
        def test_hangs(tp_rank):
            import time
            time.sleep(100 * tp_rank.rank)

        @pytest.mark.tpcheck(tp=2)
        @pytest.mark.xfail(raises=ZeroDivisionError, strict=True)
        def test_xfails(tp_rank):
            1 / 0

        @pytest.mark.tpcheck(tp=2)
        @pytest.mark.skipif("os.environ['RANK'] == '1'")
        def test_skips_where_rank_0_does():
            pytest.skip("so")

        @pytest.mark.tpcheck(tp=4)
        def test_four():
            pass

        @pytest.mark.tpcheck(tp=2)
        @given(st.integers(1, 3))
        def test_given(tp_rank, number):
            assert number in (1, 2, 3)

        def test_spawns(tp_spawn):
            note("spawns")
            assert tp_spawn(tp=3).run(lambda rank: rank.rank) == (0, 1, 2)

        @pytest.mark.tpcheck(tp=2)
        def test_fixture_fails(missing): pass

        @pytest.fixture
        def group():
            import torch
            torch.distributed.init_process_group("gloo")

        @pytest.mark.tpcheck(tp=2)
        def test_fixture_is_collective(group): pass

        def test_on_rank_1():
            print("printed there")
            assert os.environ["RANK"] == "0"
        """,
    )
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m pytest -rs --junitxml=out.xml"
    ((status, stdout, stderr),) = ends([start(launcher, suite, environ)])
    assert status == 1
    result = pytest.LineMatcher(stdout.splitlines())
    result.fnmatch_lines(
        [
            "test_it.py ..FFFxss..EE.*",
            "*fixture 'missing' not found",
            "E *UsageError: init_process_group='in a fixture': expected a call on every rank; rank 0 alone *",
            ">           assert [[]1, 2] == [[]1, 3]",
            "-* rank 1 of 2 raised; other ranks -*",
            "rank 0: stopped while waiting in all_reduce, at *",
            "-* Captured stdout rank 1 -*",
            "here is 1",
            "rank 1 of 2 died: exited with code 3 before it answered",
            "rank 1 of 2 hung: no answer within 2 s, *",
            "=* rank 1 of 2: test_it.py::test_on_rank_1 =*",
            "E *AssertionError: assert '1' == '0'",
            "printed there",
            "SKIPPED * so (*rank*)",
            "SKIPPED * needs 4 ranks, the launcher started 2",
            "=* 3 failed, 5 passed, 2 skipped, 1 xfailed, 2 errors in *",
        ]
    )
    assert stdout.count("test session starts") == 1
    assert stderr.count("(exitcode: 1)") == 1  # torchrun's report of rank 0
    assert "exitcode  : 1 " in stderr
    assert "SIGTERM" not in stderr.partition("Failures:")[2]  # both have ended by themselves
    assert (suite / "out.xml").read_text().count("<testcase") == 13
    assert (suite / "fixture").read_text() == "0"
    assert (suite / "spawns").read_text() == "0"
    assert sorted((suite / "each").read_text()) == ["0", "1"]


@pytest.mark.slow
def test_two_agents_run_shared_tests_over_their_nodes(tmp_path: Path, environ: dict[str, str]) -> None:
    suite = write(
        tmp_path,
        """
        import torch

        @pytest.mark.tpcheck(tp=2)
        def test_sum(tp_rank):
            assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == (str(tp_rank.rank), "0")
            total = torch.ones(1)
            torch.distributed.all_reduce(total)
            assert total.item() == 2
            torch.distributed.destroy_process_group()
            torch.distributed.init_process_group("gloo")
            torch.distributed.all_reduce(total)
            assert total.item() == 4
            print("node of", tp_rank.rank)

        @pytest.mark.tpcheck(tp=2)
        @pytest.mark.xfail(raises=KeyError, strict=True)
        def test_fails(tp_rank):
            if tp_rank.rank == 1:
                raise KeyError
            torch.distributed.barrier()
        """,
    )
    with reserve_port() as port:
        endpoint = f"127.0.0.1:{port.getsockname()[1]}"
    launcher = f"torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint {endpoint}"
    command = f"{launcher} --rdzv-id tests -m pytest -rP"
    results = ends([start(command, suite, environ) for _ in range(2)])
    assert [status for status, _, _ in results] == [0, 0], results
    reports = [stdout for _, stdout, _ in results if "test session starts" in stdout]
    assert len(reports) == 1
    pytest.LineMatcher(reports[0].splitlines()).fnmatch_lines(
        [
            "-* Captured stdout rank 0 -*",
            "node of 0",
            "-* Captured stdout rank 1 -*",
            "node of 1",
            "*1 passed, 1 xfailed*",
        ]
    )


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (("a", "b"), None),
        (("b", "a"), "number 1: b on rank 1, a on rank 0. Please give all ranks one order: under pytest-randomly pass"),
        (("a",), "Rank 1 has 1 and rank 0 2; the first that differs is number 2: no test on rank 1, b on rank 0"),
        (("a", "c"), "number 2: c on rank 1, b on rank 0. Please give all ranks the same files and options"),
    ],
)
def test_ranks_that_collect_something_else_are_told_what_differs(actual: tuple[str, ...], message: str | None) -> None:
    origin = RankOrigin.here(0, local_rank=0, num_gpus=0)
    place = Place(origin, machine=None, gpus=(None, 0), forks_alike=None, num_local=None)
    collected = {0: Collected(("a", "b"), 0, place), 1: Collected(actual, 0, place)}
    difference = describe_difference(collected)
    assert difference == message if message is None else message in str(difference)


@pytest.mark.slow
def test_a_rank_that_is_gone_ends_the_session_of_rank_0(tmp_path: Path, environ: dict[str, str]) -> None:
    suite = write(
        tmp_path,
        """
        def test_crashes_on_rank_1():
            if os.environ["SLURM_PROCID"] == "1":
                os._exit(7)

        @pytest.mark.tpcheck(tp=2)
        def test_shared():
            pytest.fail("did run")
        """,
    )
    (suite / "conftest.py").write_text(
        "import time\ndef pytest_runtest_logreport(report):\n    if report.when == 'teardown':\n        time.sleep(1)\n"
    )
    (status_0, stdout_0, _), (status_1, _, _) = srun(suite, environ)
    assert (status_0, status_1) == (1, 7)
    assert "Exit: the process of rank 1 has ended; 0 of 2 tests did not start" in stdout_0


def test_where_no_test_is_shared_every_rank_reports(tmp_path: Path, environ: dict[str, str]) -> None:
    suite = write(tmp_path, "def test_rank():\n    assert os.environ['SLURM_PROCID'] == '0'\n")
    (status_0, stdout_0, _), (status_1, stdout_1, _) = srun(suite, environ)
    assert (status_0, status_1) == (0, 1)
    assert "1 passed" in stdout_0
    assert "test session starts" in stdout_1
    assert "1 failed" in stdout_1
