"""Whatever ends a loop on one rank ends it on all, soon and with a reason."""

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

from tests.batches.loader.loops import Seen, batches, follow
from tpcheck import Rank, World


def shorter(rank: Rank, given: list[Any]) -> list[Any] | None:
    return given[:2] if rank.rank == 1 else None


@pytest.mark.parametrize("overlap", [False, True])
def test_ranks_that_end_early_are_counted_on_all(pair: World, overlap: bool) -> None:
    seen = pair.run(follow, shorter, overlap=overlap)
    assert {each.error for each in seen} == {"UnevenBatches"}
    (finding,) = seen[0].findings
    assert finding.cause == "uneven_length"
    assert finding.where["ranks"] == [1]
    assert finding.evidence["batches"] == {"rank 0": 3, "rank 1": 2}
    assert "batches: 3 or more on rank 0, 2 on rank 1" in seen[0].text
    assert max(each.seconds for each in seen) < 5


def test_uneven_batches_are_seen_between_compared_ones(pair: World) -> None:
    seen = pair.run(follow, lambda rank, given: given[:3] if rank.rank else given, every=4)
    assert {each.error for each in seen} == {"UnevenBatches"}
    assert seen[0].findings[0].evidence["batches"] == {"rank 0": 4, "rank 1": 3}


def test_with_warn_the_longer_rank_goes_on_alone_until_the_next_epoch(pair: World) -> None:
    def made(rank: Rank) -> Any:
        lengths = iter([2 if rank.rank else 4, 4])

        class Epochs:
            def __iter__(self) -> Iterator[Any]:
                return iter(batches(rank)[: next(lengths)])

        return Epochs()

    seen = pair.run(follow, made=made, epochs=2, on_mismatch="warn")
    assert [each.batches for each in seen] == [8, 6]
    assert [each.error for each in seen] == [None, None]
    assert all(len(each.warned) == 1 and "number of batches" in each.warned[0] for each in seen)


def test_replicas_of_other_lengths_warn_by_default(square: World) -> None:
    seen = square.run(follow, lambda rank, given: given[: 4 - rank.dp_rank], across_dp="warn", epochs=2)
    assert [each.batches for each in seen] == [8, 8, 6, 6]
    assert {each.error for each in seen} == {None}
    assert "batches_differ_across_dp  number of batches" in seen[0].warned[0]


def test_replicas_of_other_lengths_raise_where_asked(square: World) -> None:
    seen = square.run(follow, lambda rank, given: given[: 4 - rank.dp_rank])
    assert {each.error for each in seen} == {"UnevenBatches"}
    assert len({each.text for each in seen}) == 1
    assert seen[0].findings[0].evidence["batches"] == {"replica 0": 4, "replica 1": 3}


class Broken(list[Any]):
    """Raises at its third batch."""

    def __iter__(self) -> Iterator[Any]:
        yield from self[:2]
        raise OSError("sample 9 cannot be read")


@pytest.mark.parametrize("overlap", [False, True])
def test_an_exception_in_one_loader_ends_all_ranks(square: World, overlap: bool) -> None:
    seen = square.run(follow, lambda rank, given: Broken(given) if rank.rank == 2 else None, overlap=overlap)
    assert [each.error for each in seen] == ["RankFailure", "RankFailure", "OSError", "RankFailure"]
    for each in seen:
        assert "sample 9 cannot be read" in each.text
        assert each.seconds < 5
    assert seen[0].text.startswith("the data loader of rank 2 raised OSError at batch 2")
    assert "in __iter__" in seen[0].text  # with its traceback


def leaves(rank: Rank, *, who: tuple[int, ...], epochs: int) -> Seen:
    import tpcheck

    loader = tpcheck.watch(batches(rank), topology=rank.topology, timeout=20)
    seen, start = Seen(0, 0.0), time.monotonic()
    try:
        for _ in range(epochs):
            for number, _batch in enumerate(loader):
                seen.batches += 1
                if number == 1 and rank.rank in who:
                    break
    except tpcheck.TpcheckError as error:
        seen.error, seen.text = type(error).__name__, str(error)
    seen.seconds = time.monotonic() - start
    return seen


def test_a_break_on_all_ranks_is_no_fault(square: World) -> None:
    seen = square.run(leaves, who=(0, 1, 2, 3), epochs=3)
    assert {(each.error, each.batches) for each in seen} == {(None, 6)}


def test_a_break_on_one_rank_stops_the_others(square: World) -> None:
    seen = square.run(leaves, who=(1,), epochs=2)
    assert {each.error for each in seen} == {"UnevenBatches"}
    assert {each.batches for each in seen} == {2}
    assert max(each.seconds for each in seen) < 5


def test_a_rank_that_has_left_does_not_wait(pair: World) -> None:
    seen = pair.run(leaves, who=(1,), epochs=1)
    assert [each.error for each in seen] == ["UnevenBatches", None]


def breaks_at_the_wrong_batch(rank: Rank) -> tuple[list[str], list[str], str]:
    """Leave the loop while the last batch, which differs, is still being compared."""
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


def test_what_is_found_after_a_break_is_warned_of_and_raised_by_the_next_pass(pair: World) -> None:
    for warned, ignored, text in pair.run(breaks_at_the_wrong_batch):
        assert ignored == []
        assert warned == [text]
        assert "batches_agree_within_tp  labels" in text


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
        said = {rank: ranks[rank].communicate(timeout=90)[0] for rank in range(4) if rank != victim}
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank, text in said.items():
        assert "END" in text, (rank, text)
        start = float(text.split("START ")[1].split()[0])
        end, first, *_ = text.split("END ")[1].split()
        assert float(end) - start < (3 if how == "SIGKILL" else 8), (rank, text)
        assert int(first) == victim, (rank, text)
        assert f"rank {victim} of " in text
