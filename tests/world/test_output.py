"""The stacks that faulthandler writes are read: where a rank is, and in which collective."""

from __future__ import annotations

from types import FunctionType

import pytest

from tpcheck.pytest_plugin.run_on_rank import body_failed, run_body
from tpcheck.world import output
from tpcheck.world.failures import serialized_exception

_DUMP = """\
Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x00007f2 (most recent call first):
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3245 in all_gather
  File "/v/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 2800 in all_gather_object
  File "/v/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/me/test_x.py", line 12 in body
  File "/v/site-packages/tpcheck/world/rank_main.py", line 90 in _call
  File "/v/site-packages/tpcheck/world/forkserver.py", line 40 in main
  File "<string>", line 1 in <module>

Extension modules: numpy.core (total: 1)
"""


def dump_line(function: FunctionType) -> str:
    """Return a line of faulthandler for a frame of this function."""
    return f'  File "{function.__code__.co_filename}", line 37 in {function.__name__}\n'


def test_the_stack_is_that_of_the_thread_that_runs_the_function() -> None:
    frames = output.main_stack(_DUMP)
    assert [frame.function for frame in frames] == ["all_gather", "wrapper", "all_gather_object", "wrapper", "body"]


def test_the_stack_ends_where_the_plugin_calls_the_test() -> None:
    rank_main = '  File "/v/site-packages/tpcheck/world/rank_main.py"'
    assert isinstance(run_body, FunctionType)
    dump = _DUMP.replace(rank_main, dump_line(run_body) + rank_main)
    assert output.main_stack(dump) == output.main_stack(_DUMP)


def test_the_collective_has_the_name_that_the_users_code_called() -> None:
    assert output.collective(output.main_stack(_DUMP)) == "all_gather_object"


def test_code_outside_of_collectives_is_in_none() -> None:
    assert output.collective(output.main_stack(_DUMP)[4:]) is None


def test_a_dtensor_that_waits_for_its_values_is_in_a_collective() -> None:
    operator = output.Frame("/v/site-packages/torch/_ops.py", "1279", "__call__")
    wait = output.Frame("/v/site-packages/torch/distributed/_functional_collectives.py", "142", "wait_tensor")
    forward = output.Frame("/home/me/model.py", "12", "forward")
    assert output.collective((operator, wait, forward)) == "wait_tensor"
    assert output.collective((operator, forward)) is None


def test_the_place_is_the_innermost_line_outside_of_libraries() -> None:
    frames = output.main_stack(_DUMP)
    assert output.user_place(frames) == "/home/me/test_x.py:12 in body"
    assert output.user_place(frames[:1]) == "/v/site-packages/torch/distributed/distributed_c10d.py:3245 in all_gather"
    assert output.user_place(()) is None


@pytest.mark.parametrize("function", [body_failed, serialized_exception])
def test_a_rank_that_serializes_its_exception_is_recognised(function: FunctionType) -> None:
    body_line = '  File "/home/me/test_x.py", line 12 in body\n'
    assert not output.is_serializing(output.main_stack(_DUMP))
    assert output.is_serializing(output.main_stack(_DUMP.replace(body_line, dump_line(function))))


def test_a_stack_reads_like_a_traceback() -> None:
    lines = output.as_traceback(output.main_stack(_DUMP)).splitlines()
    assert lines[:2] == ["Stack (most recent call last):", '  File "/home/me/test_x.py", line 12, in body']


def test_an_empty_dump_has_no_stack() -> None:
    assert output.main_stack("") == ()
    assert output.collective(()) is None


def test_the_end_of_long_output_is_kept_under_a_notice() -> None:
    files = output.Output(capture=True)
    with open(files.descriptors[0], "w", closefd=False) as stdout:
        stdout.write("x" * (1 << 20) + "the end\n")
    notice, _, text = files.stdout.partition("\n")
    assert output.is_truncation_notice(notice)
    assert text.endswith("x" + "the end\n")
    assert len(text) == 1 << 20
    files.restart()
    assert files.stdout == ""
    files.close()
