"""The examples in docstrings run."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def runs(path: Path) -> bool:
    return any(">>> " in line and "+SKIP" not in line for line in path.read_text().splitlines())


EXAMPLES = [path for path in sorted((ROOT / "tpcheck").rglob("*.py")) if runs(path)]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", [module_of(path) for path in EXAMPLES])
def test_the_examples_of_a_module_run(name: str) -> None:
    failed, attempted = doctest.testmod(import_module(name))
    assert attempted > 0
    assert failed == 0


def test_the_modules_of_integers_have_examples() -> None:
    assert {"tpcheck.core.topology", "tpcheck.core.placement", "tpcheck.core.errors"} <= {
        module_of(path) for path in EXAMPLES
    }
