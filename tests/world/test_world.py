"""A world runs functions on every rank, in an environment that is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.world import rank_bodies as bodies
from tpcheck import Rank, Topology, UsageError, World, spawn


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with spawn(Topology(tp=2)) as world:
        yield world


def test_results_are_in_the_order_of_ranks(world: World) -> None:
    assert world.run(lambda rank, factor, add: rank.rank * factor + add, 10, add=1) == (1, 11)


def test_processes_serve_the_next_run(world: World) -> None:
    assert world.run(bodies.process_id) == world.run(bodies.process_id)


def test_tensors_are_returned(world: World) -> None:
    import torch

    assert torch.equal(world.run(lambda rank: torch.full((2,), rank.rank))[1], torch.tensor([1, 1]))


def test_functions_of_a_script_run_and_the_controller_imports_no_torch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from tpcheck import Topology, spawn\n"
        "def double(rank): return rank.rank * 2, 'torch' in sys.modules\n"
        "with spawn(Topology(tp=2), preload=['torch']) as world: print(world.run(double), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "((0, True), (2, True)) False\n"


def test_ranks_have_the_current_environment_import_path_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "def here(rank):\n    import os; return os.getcwd(), os.environ['COLOUR']\n"
    (tmp_path / "just_written.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLOUR", "blue")
    import just_written  # type: ignore[import-not-found]

    with spawn(Topology(tp=2)) as world:
        assert world.run(just_written.here) == ((str(tmp_path), "blue"),) * 2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("RANK", ("0", "1")),
        ("LOCAL_RANK", ("0", "1")),
        ("WORLD_SIZE", ("2", "2")),
        ("LOCAL_WORLD_SIZE", ("2", "2")),
        ("LOCAL_SIZE", ("2", "2")),
        ("MASTER_ADDR", ("127.0.0.1", "127.0.0.1")),
        ("OMP_NUM_THREADS", ("1", "1")),
        ("TORCH_DISTRIBUTED_DEBUG", ("DETAIL", "DETAIL")),
        ("TORCHELASTIC_RUN_ID", (None, None)),
    ],
)
def test_launcher_variables_are_set(world: World, name: str, values: tuple[str | None, ...]) -> None:
    assert world.run(bodies.environment_variable, name) == values


def test_a_collective_of_different_dtypes_is_an_error_unless_debugging_is_off(world: World) -> None:
    def reduce_mixed(rank: Rank) -> None:
        import torch

        torch.distributed.all_reduce(torch.zeros(2, dtype=(torch.int32, torch.float32)[rank.rank]))

    with pytest.raises(Exception, match="Detected mismatch between collectives"):
        world.run(reduce_mixed)
    with spawn(Topology(tp=2), env={"TORCH_DISTRIBUTED_DEBUG": "OFF"}) as quick:
        quick.run(reduce_mixed)


def test_ranks_are_seeded_differently_and_equally_in_every_run(world: World) -> None:
    first, second = world.run(bodies.draw)
    assert all(number_0 != number_1 for number_0, number_1 in zip(first, second, strict=True))
    assert world.run(bodies.draw) == (first, second)


def test_a_seed_is_the_same_on_every_rank() -> None:
    with spawn(Topology(tp=2), seed=7) as world:
        first, second = world.run(bodies.draw)
    assert first == second


def test_output_of_ranks_is_captured_at_descriptor_level(world: World) -> None:
    world.run(bodies.print_everywhere)
    for outcome in world.outcomes:
        assert outcome.stdout == "python to stdout\ndescriptor 1\nchild of the rank\n"
        assert outcome.stderr == "python to stderr\n"
    world.run(bodies.process_id)
    assert world.outcomes[0].stdout == ""


def test_output_of_ranks_goes_to_the_controllers_output_without_capture(capfd: pytest.CaptureFixture[str]) -> None:
    with spawn(Topology(tp=2), capture=False) as world:
        world.run(bodies.print_everywhere)
    assert capfd.readouterr().out.count("descriptor 1\n") == 2


def test_code_under_test_may_replace_the_default_group() -> None:
    with spawn(Topology(tp=2)) as world:
        before = world.run(bodies.process_id)
        assert world.run(bodies.replace_default_group) == (3, 3)
        after = world.run(bodies.process_id)
        assert set(before).isdisjoint(after)  # processes with another default group serve no other run
        assert world.run(bodies.all_reduce) == (3, 3)


def test_code_under_test_may_listen_on_the_master_port() -> None:
    with spawn(Topology(tp=2)) as world:
        assert world.run(bodies.use_store_on_master_port) == (b"value", b"value")


@pytest.mark.parametrize("debug", ["DETAIL", "OFF"])
def test_distributed_data_parallel_trains_on_ranks(debug: str) -> None:
    with spawn(Topology(dp=2), env={"TORCH_DISTRIBUTED_DEBUG": debug}) as world:
        assert world.run(bodies.train_with_ddp) == (1.0, 1.0)


def test_data_loader_workers_run_on_ranks() -> None:
    with spawn(Topology(tp=2)) as world:
        assert world.run(bodies.load_data_with_workers) == (28, 28)
        assert world.run(bodies.load_data_with_workers) == (28, 28)


def test_also_is_imported_before_ranks_are_forked() -> None:
    def has(rank: Rank, name: str) -> bool:
        return name in sys.modules

    with spawn(Topology(tp=1), also=["xml.nosuch", "nosuchmod", "xml.sax.expatreader"]) as world:
        assert world.run(has, "xml.sax.expatreader") == (True,)


def test_ranks_have_what_the_controller_has_imported_of_this_package() -> None:
    import tpcheck.lab.known

    with spawn(Topology(tp=1)) as world:
        assert world.run(lambda rank, name: name in sys.modules, tpcheck.lab.known.__name__) == (True,)


@pytest.mark.parametrize("preload", [None, ("torch",)], ids=["preloaded", "imported by the rank"])
def test_deepspeed_has_no_shared_memory_all_reduce(preload: tuple[str, ...] | None) -> None:
    pytest.importorskip("deepspeed")
    with spawn(Topology(tp=1), preload=preload) as world:
        assert world.run(bodies.has_no_shared_memory_operator) == (True,)


def test_deepspeed_uses_the_default_group(world: World) -> None:
    pytest.importorskip("deepspeed")

    def deepspeed_world_size(rank: Rank) -> int:
        import deepspeed

        deepspeed.init_distributed("gloo")
        size: int = deepspeed.comm.get_world_size()
        return size

    assert world.run(deepspeed_world_size) == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout=0: expected seconds above 0, or None for no limit"),
        ({"timeout": "5"}, "timeout='5': expected seconds above 0, or None for no limit"),
        ({"timeout": float("nan")}, "timeout=nan: expected seconds above 0, or None for no limit"),
        (
            {"seed": "a"},
            "seed='a': expected an integer from 0 to 2**64 - 1, or None for a different seed",
        ),
        ({"seed": 2**70}, f"seed={2**70}: expected an integer from 0 to 2**64 - 1"),
        ({"env": {"A": 1}}, "env={'A': 1}: expected a string as the value of A"),
        ({"env": {"A=B": "1"}}, "env={'A=B': '1'}: expected names of variables: strings without ="),
        ({"env": {"A": "\ud800"}}, "expected a string as the value of A"),
        ({"env": ["A"]}, "env=['A']: expected a mapping of names to values, both strings"),
        ({"preload": "torch"}, "preload='torch': expected a sequence of module names, such as [\"torch\"]"),
        ({"preload": ["nosuchmod"]}, "preload='nosuchmod': expected modules that are installed"),
        ({"preload": [1]}, "preload=1: expected names of modules"),
        ({"also": ["a b"]}, "also='a b': expected names of modules"),
        ({"device": "tpu"}, "device='tpu': expected one of cpu, cuda"),
        ({"backend": "mpi"}, "backend='mpi': expected one of gloo, nccl"),
        ({"backend": "nccl", "device": "cpu"}, "backend='nccl': expected gloo: 2 ranks on 0 GPUs"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        spawn(Topology(tp=2), **options)


def test_more_ranks_than_memory_holds_are_refused_before_one_is_forked() -> None:
    with pytest.raises(UsageError, match=r"fewer ranks: 10,000,000 processes .* need more than [\d,.]+ GiB"):
        spawn(Topology(tp=10_000_000))


def test_a_preloaded_module_that_fails_to_import_is_named() -> None:
    world = spawn(Topology(tp=1), preload=["json.nosuchmod"])
    with pytest.raises(UsageError, match=r"preload='json\.nosuchmod': expected modules that can be imported \(Module"):
        world.run(bodies.process_id)


@pytest.mark.parametrize("timeout", [float("inf"), 1e12])
def test_a_timeout_may_be_longer_than_select_accepts(world: World, timeout: float) -> None:
    before, world.timeout = world.timeout, timeout
    assert world.run(bodies.all_reduce) == (3, 3)
    with pytest.raises(UsageError, match="timeout=0: expected seconds above 0"):
        world.timeout = 0
    world.timeout = before


def test_a_forkserver_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpcheck import TpcheckError

    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TpcheckError, match="did not start"), spawn(Topology(tp=1), preload=("json",)) as world:
        world.run(bodies.process_id)


def test_the_forkserver_has_one_thread(world: World) -> None:
    """A child forked from a process with threads may wait forever for a lock of another thread."""

    def threads_of_forkserver(rank: Rank) -> int:
        return len(os.listdir(f"/proc/{os.getppid()}/task"))  # noqa: PTH208

    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc here")
    assert world.run(threads_of_forkserver) == (1, 1)


@pytest.mark.parametrize("device", ["cuda"])
def test_gpus_carry_collectives(device: str, gpus: int) -> None:
    def reduce_on_gpu(rank: Rank) -> tuple[int, str]:
        import torch

        number = torch.ones((), device=rank.device)
        torch.distributed.all_reduce(number, group=rank.group("tp"))
        return int(number), rank.device.type

    with spawn(Topology(tp=2), device=device) as world:
        assert world.backend == ("nccl" if gpus >= 2 else "gloo")
        assert world.run(reduce_on_gpu) == ((2, "cuda"),) * 2


@pytest.fixture
def gpus() -> int:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.cuda.device_count()
