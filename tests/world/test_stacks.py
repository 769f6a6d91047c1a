"""What faulthandler writes is read back: where a rank is, and in which collective."""

from __future__ import annotations

from tpcheck.world import output

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
  File "/v/site-packages/tpcheck/world/template.py", line 40 in main
  File "<string>", line 1 in <module>

Extension modules: numpy.core (total: 1)
"""


def test_the_stack_is_that_of_the_thread_that_runs_the_function() -> None:
    frames = output.main_stack(_DUMP)
    assert [frame.function for frame in frames] == ["all_gather", "wrapper", "all_gather_object", "wrapper", "body"]


def test_the_stack_ends_where_the_plugin_calls_the_test() -> None:
    main = '  File "/v/site-packages/tpcheck/world/rank_main.py"'
    dump = _DUMP.replace(main, '  File "/v/site-packages/tpcheck/pytest_plugin/body.py", line 37 in run_body\n' + main)
    assert output.main_stack(dump) == output.main_stack(_DUMP)


def test_the_collective_has_the_name_its_caller_used() -> None:
    assert output.collective(output.main_stack(_DUMP)) == "all_gather_object"


def test_code_outside_of_collectives_is_in_none() -> None:
    assert output.collective(output.main_stack(_DUMP)[4:]) is None


def test_a_stack_reads_like_a_traceback() -> None:
    lines = output.as_traceback(output.main_stack(_DUMP)).splitlines()
    assert lines[:2] == ["Stack (most recent call last):", '  File "/home/me/test_x.py", line 12, in body']


def test_nothing_written_is_no_stack() -> None:
    assert output.main_stack("") == ()
    assert output.collective(()) is None
