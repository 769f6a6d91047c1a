"""What people see when a run fails, to the letter."""

from __future__ import annotations

from tpcheck import RankOutcome
from tpcheck.world.failures import failure_text

_STACK = """\
Stack (most recent call last):
  File "/home/me/test_x.py", line 12, in body
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3245, in all_reduce"""
_LOOP = """\
Stack (most recent call last):
  File "/home/me/test_x.py", line 7, in step"""


def test_an_exception() -> None:
    outcomes = (
        RankOutcome(0, "stopped", traceback=_STACK, collective="all_reduce", stdout="loss 3.2\n"),
        RankOutcome(
            1,
            "raised",
            error_type="ValueError",
            error="3 heads\nfor 2 ranks",
            traceback="Traceback (most recent call last):\n  ...\nValueError: 3 heads\nfor 2 ranks\n",
            stderr="a warning\n",
        ),
        RankOutcome(2, "raised", error_type="ValueError", error="3 heads\nfor 2 ranks", traceback="..."),
        RankOutcome(3, "returned"),
    )
    assert failure_text(outcomes, first=1, timeout=60) == (
        "rank 1 of 4 raised ValueError: 3 heads\n"
        "\n"
        "Traceback (most recent call last):\n"
        "  ...\n"
        "ValueError: 3 heads\n"
        "for 2 ranks\n"
        "\n"
        "rank 0: stopped while waiting in all_reduce, at /home/me/test_x.py:12 in body\n"
        "rank 2: raised the same ValueError\n"
        "rank 3: had returned\n"
        "\n"
        "captured stderr of rank 1:\n"
        "a warning\n"
        "\n"
        "captured stdout of rank 0:\n"
        "loss 3.2"
    )


def test_a_death() -> None:
    outcomes = (
        RankOutcome(0, "died", signal="SIGKILL"),
        RankOutcome(1, "raised", error_type="RuntimeError", error="Connection closed by peer"),
        RankOutcome(2, "died", exit_code=3),
        RankOutcome(3, "stopped"),
    )
    assert failure_text(outcomes, first=0, timeout=60) == (
        "rank 0 of 4 died: killed by SIGKILL\n"
        "\n"
        "rank 1: raised RuntimeError: Connection closed by peer\n"
        "rank 2: died: exited with code 3 before it answered\n"
        "rank 3: stopped while at a place it did not show"
    )


def test_a_hang() -> None:
    outcomes = (
        RankOutcome(0, "hung", traceback=_STACK, collective="all_reduce"),
        RankOutcome(1, "hung", traceback=_LOOP),
    )
    assert failure_text(outcomes, first=1, timeout=2.5) == (
        "rank 1 of 2 hung: no answer within 2.5 s, not in a collective, at /home/me/test_x.py:7 in step\n"
        "\n" + _LOOP + "\n"
        "\n"
        "rank 0: hung waiting in all_reduce, at /home/me/test_x.py:12 in body\n"
        "\n"
        "rank 0:\n" + _STACK
    )


def test_a_rank_that_was_about_to_raise_alike() -> None:
    reporting = """\
Stack (most recent call last):
  File "/v/site-packages/tpcheck/pytest_plugin/rank_failure.py", line 66, in _longrepr
  File "/v/site-packages/_pytest/_code/code.py", line 12, in getrepr"""
    outcomes = (
        RankOutcome(0, "raised", error_type="ValueError", error="3 heads", traceback="..."),
        RankOutcome(1, "stopped", traceback=reporting),
        RankOutcome(2, "stopped", traceback=reporting.replace("pytest_plugin/rank_failure", "world/failure")),
    )
    assert failure_text(outcomes, first=0, timeout=60).endswith("rank 1: was raising, too\nrank 2: was raising, too")


def test_output_that_was_not_kept_whole() -> None:
    printed = "[... 9.1 MB before this]\n" + "".join(f"{number}\n" for number in range(102))
    outcomes = (RankOutcome(0, "died", exit_code=3, stdout=printed),)
    text = failure_text(outcomes, first=0, timeout=60)
    assert "\ncaptured stdout of rank 0:\n[... 9.1 MB before this]\n... (2 lines more)\n2\n3\n" in text
