from __future__ import annotations

from collections.abc import Callable
from textwrap import dedent

import hypothesis as hypothesis
import pytest
import torch as torch

# Imported here, they outlast the inner sessions, which forget what they imported; torch crashes when imported twice.

Run = Callable[..., pytest.RunResult]


@pytest.fixture(autouse=True)
def own_root(pytester: pytest.Pytester) -> None:
    """Keep what stands in folders above out of the inner sessions."""
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider")


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Return a function that runs pytest on a test file of this source, in this process: the template is shared."""

    def run_source(source: str, *args: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=f"import pytest\n\n{dedent(source)}")
        return pytester.runpytest_inprocess(*args)

    return run_source
