"""Whatever ends a loop on one rank ends it on all ranks, at once and with a reason."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.batches.loader.loops import LoopResult, batches, run_loop
from tpcheck import Rank, World


def shorter(rank: Rank, given: list[Any]) -> list[Any] | None:
    return given[:2] if rank.rank == 1 else None


@pytest.mark.parametrize("overlap", [False, True])
def test_ranks_that_end_early_are_reported_on_all(pair: World, overlap: bool) -> None:
    results = pair.run(run_loop, shorter, overlap=overlap)
    assert {each.error for each in results} == {"UnevenBatches"}
    (finding,) = results[0].findings
    assert finding.cause == "uneven_length"
    assert finding.where["ranks"] == [1]
    assert finding.evidence["batches"] == {"rank 0": 3, "rank 1": 2}
    assert "batches: 3 or more on rank 0, 2 on rank 1" in results[0].text
    assert max(each.seconds for each in results) < 5


def test_with_every_4_uneven_batches_in_between_are_found(pair: World) -> None:
    results = pair.run(run_loop, lambda rank, given: given[:3] if rank.rank else given, every=4)
    assert {each.error for each in results} == {"UnevenBatches"}
    assert results[0].findings[0].evidence["batches"] == {"rank 0": 4, "rank 1": 3}


def test_with_warn_the_longer_rank_goes_on_alone_until_the_next_epoch(pair: World) -> None:
    def make(rank: Rank) -> Any:
        lengths = iter([2 if rank.rank else 4, 4])

        class Epochs:
            def __iter__(self) -> Iterator[Any]:
                return iter(batches(rank)[: next(lengths)])

        return Epochs()

    results = pair.run(run_loop, make=make, epochs=2, on_mismatch="warn")
    assert [each.batches for each in results] == [8, 6]
    assert [each.error for each in results] == [None, None]
    assert all(len(each.warned) == 1 and "number of batches" in each.warned[0] for each in results)


def test_replicas_of_different_lengths_warn_by_default(square: World) -> None:
    results = square.run(run_loop, lambda rank, given: given[: 4 - rank.dp_rank], across_dp="warn", epochs=2)
    assert [each.batches for each in results] == [8, 8, 6, 6]
    assert {each.error for each in results} == {None}
    assert "batches_differ_across_dp  number of batches" in results[0].warned[0]


def test_replicas_of_different_lengths_raise_with_across_dp_raise(square: World) -> None:
    results = square.run(run_loop, lambda rank, given: given[: 4 - rank.dp_rank])
    assert {each.error for each in results} == {"UnevenBatches"}
    assert len({each.text for each in results}) == 1
    assert results[0].findings[0].evidence["batches"] == {"replica 0": 4, "replica 1": 3}


class Broken(list[Any]):
    """Raises at its third batch."""

    def __iter__(self) -> Iterator[Any]:
        yield from self[:2]
        raise OSError("sample 9 cannot be read")


@pytest.mark.parametrize("overlap", [False, True])
def test_an_exception_in_one_loader_ends_all_ranks(square: World, overlap: bool) -> None:
    results = square.run(run_loop, lambda rank, given: Broken(given) if rank.rank == 2 else None, overlap=overlap)
    assert [each.error for each in results] == ["RankFailure", "RankFailure", "OSError", "RankFailure"]
    for each in results:
        assert "sample 9 cannot be read" in each.text
        assert each.seconds < 5
    assert results[0].text.startswith("the data loader of rank 2 raised OSError at batch 2")
    assert "in __iter__" in results[0].text  # with its traceback


def break_out(rank: Rank, *, who: tuple[int, ...], epochs: int) -> LoopResult:
    import tpcheck

    loader = tpcheck.watch(batches(rank), topology=rank.topology, timeout=20)
    result, start = LoopResult(0, 0.0), time.monotonic()
    try:
        for _ in range(epochs):
            for number, _batch in enumerate(loader):
                result.batches += 1
                if number == 1 and rank.rank in who:
                    break
    except tpcheck.TpcheckError as error:
        result.error, result.text = type(error).__name__, str(error)
    result.seconds = time.monotonic() - start
    return result


def test_a_break_on_all_ranks_is_not_a_mismatch(square: World) -> None:
    results = square.run(break_out, who=(0, 1, 2, 3), epochs=3)
    assert {(each.error, each.batches) for each in results} == {(None, 6)}


def test_a_break_on_one_rank_stops_the_others(square: World) -> None:
    results = square.run(break_out, who=(1,), epochs=2)
    assert {each.error for each in results} == {"UnevenBatches"}
    assert {each.batches for each in results} == {2}
    assert max(each.seconds for each in results) < 5


def test_a_rank_that_breaks_does_not_wait(pair: World) -> None:
    results = pair.run(break_out, who=(1,), epochs=1)
    assert [each.error for each in results] == ["UnevenBatches", None]


def breaks_at_the_wrong_batch(rank: Rank) -> tuple[list[str], list[str], str]:
    """Break while the last batch, which differs, is still being compared."""
    import sys
    import warnings

    import tpcheck

    given = batches(rank)
    given[2]["labels"] += rank.tp_rank
    loader = tpcheck.watch(given, topology=rank.topology, timeout=20, overlap=True)
    ignored: list[str] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda found: ignored.append(str(found.exc_value))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, _batch in enumerate(loader):
            if number == 2:
                break
    sys.unraisablehook = hook
    try:
        next(iter(loader))
    except tpcheck.BatchMismatch as mismatch:
        text = str(mismatch)
    return [str(each.message) for each in caught], ignored, text


def test_a_mismatch_found_after_a_break_warns_and_is_raised_by_the_next_epoch(pair: World) -> None:
    for warned, ignored, text in pair.run(breaks_at_the_wrong_batch):
        assert ignored == []
        assert warned == [text]
        assert "batches_agree_within_tp" in text


SCRIPT = """
import os, signal, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
import tpcheck
rank, victim, how = dist.get_rank(), int(sys.argv[1]), sys.argv[2]
topology = tpcheck.Topology(tp=2, dp=2)

def loader():
    for number in range(100):
        if number == 3:
            print("START", time.time(), flush=True)
            if rank == victim:
                os.kill(os.getpid(), getattr(signal, how))
        yield [rank // 2, number]

try:
    for batch in tpcheck.watch(loader(), topology=topology, timeout=3):
        pass
except tpcheck.RankFailure as error:
    print("END", time.time(), error.first, error, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(("victim", "how"), [(1, "SIGKILL"), (0, "SIGKILL"), (3, "SIGSTOP")])
def test_a_rank_that_is_killed_or_hangs_ends_all_others(victim: int, how: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environ = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(victim), how],
            env={**os.environ, **environ, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        outputs = {rank: ranks[rank].communicate(timeout=90)[0] for rank in range(4) if rank != victim}
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank, text in outputs.items():
        assert "END" in text, (rank, text)
        start = float(text.split("START ")[1].split()[0])
        end, first, *_ = text.split("END ")[1].split()
        assert float(end) - start < (3 if how == "SIGKILL" else 8), (rank, text)
        assert int(first) == victim, (rank, text)
        assert f"rank {victim} of " in text
