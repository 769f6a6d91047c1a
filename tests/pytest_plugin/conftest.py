from __future__ import annotations

from collections.abc import Callable
from textwrap import dedent

import hypothesis as hypothesis
import pytest
import torch as torch

# Inner sessions remove the modules that they import, except those that are imported here; torch crashes when it is
# imported twice.

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def pytester(pytester: pytest.Pytester) -> pytest.Pytester:
    """Keep the configuration of parent folders out of the inner sessions."""
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider -p no:randomly")
    return pytester


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Return a function that runs pytest on a test file of this source, in this process, to share the forkserver."""

    def run_source(source: str, *args: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=f"import pytest\n\n{dedent(source)}")
        return pytester.runpytest_inprocess(*args)

    return run_source
