"""pytest plugin `tpcheck`: a marked test's body runs on every rank of a world.

`options` and `fixtures` are what users write; `controller` and `body_runner` run tests in pytest's process, which needs
no torch; `run_on_rank` is what every rank calls; `failure_report` turns the outcomes of ranks into what pytest shows.
`launched` is for pytest that a launcher has started on every rank.
"""

from tpcheck.pytest_plugin.controller import (
    pytest_collection_finish,
    pytest_pyfunc_call,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_runtest_setup,
)
from tpcheck.pytest_plugin.fixtures import tp_rank, tp_spawn
from tpcheck.pytest_plugin.launched import pytest_sessionstart
from tpcheck.pytest_plugin.options import pytest_addoption, pytest_configure, pytest_report_header

__all__ = [
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_configure",
    "pytest_pyfunc_call",
    "pytest_report_header",
    "pytest_runtest_makereport",
    "pytest_runtest_protocol",
    "pytest_runtest_setup",
    "pytest_sessionstart",
    "tp_rank",
    "tp_spawn",
]
