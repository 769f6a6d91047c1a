"""Scripts under ci/, and functions of tests, import names that exist: nothing else would notice before they run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield (script, module, name) for every name of tpcheck that a Python file imports, inside functions, too."""
    files = (path for folder in ("ci", "tests") for path in (ROOT / folder).rglob("*") if path.is_file())
    for script in sorted(path for path in files if "__pycache__" not in path.parts):
        if script.suffix not in ("", ".py"):
            continue
        text = script.read_text()
        if not script.suffix and not text.startswith("#!/usr/bin/env python"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tpcheck":
                yield from ((str(script.relative_to(ROOT)), str(node.module), alias.name) for alias in node.names)


def test_every_name_that_is_imported_exists() -> None:
    missing = []
    for script, module, name in imports():
        if module.endswith("lightning"):
            continue  # an extra that may be missing; its tests are skipped then
        try:
            found = hasattr(import_module(module), name) or import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append(f"{script}: {module}.{name}")
    assert missing == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return ci/gpu as a module."""
    spec = spec_from_loader("ci_gpu", SourceFileLoader("ci_gpu", str(ROOT / "ci/gpu")))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ci_gpu", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)
    return module


def test_wheels_for_another_python_or_platform_are_left_out_on_a_machine_with_a_gpu(gpu: ModuleType) -> None:
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert gpu.fits_here("peft-0.19.0-py3-none-any.whl")
    assert not gpu.fits_here(f"xxhash-3.5.0-{here}-{here}-macosx_11_0_riscv.whl")
    assert not gpu.fits_here("xxhash-3.5.0-cp27-cp27m-any.whl")


def test_a_library_that_is_there_and_does_not_import_is_not_run_on_a_gpu(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import a_dependency_without_a_wheel")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "No module named 'a_dependency_without_a_wheel'" in gpu.why_not_imported("half_installed")
    assert gpu.why_not_imported("no_such_library") == "no_such_library is not installed"
    assert gpu.why_not_imported("json") is None
