"""Tests on ranks under the plugins that many projects have, all at once, and the coverage of what ranks run."""

from __future__ import annotations

from pathlib import Path

import pytest

_SUITE = """
import os
from pathlib import Path

import code_under_test
import pytest

@pytest.mark.tpcheck(tp=2)
@pytest.mark.parametrize("number", range(3))
def test_passes(tp_rank, number):
    assert code_under_test.name_of(tp_rank.rank) == ("zero", "one")[tp_rank.rank]

@pytest.mark.flaky(reruns=2)
@pytest.mark.tpcheck(tp=2)
def test_fails_at_first(tp_rank, tmp_path_factory):
    again = Path("again").exists()
    tp_rank.gather(None)
    Path("again").touch()
    assert again

@pytest.mark.tpcheck(tp=2)
@pytest.mark.timeout(2)
def test_takes_long(tp_rank):
    import time
    time.sleep(100)
"""
_CODE = """
def name_of(rank):
    if rank == 0:
        return "zero"
    return "one"
"""
_CONFTEST = """
import pytest
from tpcheck.world.forkserver_client import _forkservers

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):  # as pytest-timeout, which starts its timer here
    assert all(forkserver._ready is not None for forkserver in _forkservers.values())
    return (yield)
"""
_SETTINGS = """
[tool.coverage.run]
patch = ["subprocess", "fork", "_exit"]
parallel = true
"""


def test_tests_on_ranks_run_under_other_plugins(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytest_cov", "pytest_randomly", "pytest_rerunfailures", "pytest_timeout", "xdist"):
        pytest.importorskip(name)
    _leave_out_heavy_packages(pytester.path / "light")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path / "light"))
    (pytester.path / "tox.ini").unlink()  # settings are in pyproject.toml
    pytester.makepyprojecttoml(_SETTINGS)
    pytester.makeconftest(_CONFTEST)
    pytester.makepyfile(test_it=_SUITE, code_under_test=_CODE)
    result = pytester.runpytest_subprocess(
        *("-n", "1", "--randomly-seed=3", "--timeout=300", "--cov=code_under_test", "--cov-report=term-missing")
    )
    result.stdout.fnmatch_lines_random(
        [
            "Using --randomly-seed=3",
            "*Failed: Timeout (>2.0s) from pytest-timeout.",
            "code_under_test.py * 0 * 100%*",
            "*1 failed, 4 passed, 1 rerun in *",
        ]
    )


def _leave_out_heavy_packages(folder: Path) -> None:
    """Hide transformers and deepspeed, whose imports take seconds, behind empty ones."""
    for name in ("transformers", "deepspeed/runtime"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    (folder / "deepspeed" / "__init__.py").touch()
    (folder / "deepspeed" / "runtime" / "utils.py").write_text("def set_random_seed(seed): ...\n")  # for randomly
