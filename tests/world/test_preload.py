"""The forkserver imports what is installed and returns what fails; it finds the children of its ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpcheck.world.forkserver import children, children_among_all, import_all, models_listed_fast


def test_modules_that_fail_to_import_are_returned_and_missing_packages_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "preload_works.py").touch()
    (tmp_path / "preload_fails.py").write_text("raise OSError('no library')")
    monkeypatch.syspath_prepend(tmp_path)
    errors = import_all(["preload_works", "preload_fails", "no_such_package.module"])
    assert errors == {"preload_fails": "OSError: no library"}
    assert "preload_works" in sys.modules
    del sys.modules["preload_works"]


def test_a_folder_that_is_missing_while_the_forkserver_imports_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = tmp_path / "later"
    monkeypatch.syspath_prepend(str(later))
    assert import_all(["no_such_package"]) == {}  # looked for in every folder
    later.mkdir()
    (later / "made_later.py").write_text("")
    assert import_all(["made_later"]) == {}
    assert "made_later" in sys.modules
    del sys.modules["made_later"]


def test_the_caches_that_a_process_group_clears_are_cleared_before_ranks_are_forked() -> None:
    from torch._dynamo import trace_rules

    trace_rules.get_tensor_method()
    import_all([])
    assert trace_rules.get_tensor_method.cache_info().currsize == 0


def test_transformers_knows_the_same_names_of_models_where_it_lists_them_fast() -> None:
    from transformers.utils import import_utils

    models = str(Path(import_utils.__file__).parents[1] / "models" / "__init__.py")
    list_names, names_in_all = import_utils.create_import_structure_from_path, import_utils.fetch__all__
    define = import_utils.define_import_structure.__wrapped__
    list_names.cache_clear()
    with models_listed_fast():
        assert import_utils.create_import_structure_from_path is not list_names
        assert import_utils.fetch__all__ is not names_in_all
        listed = define(models)
    assert import_utils.create_import_structure_from_path is list_names
    assert import_utils.fetch__all__ is names_in_all
    list_names.cache_clear()
    assert listed == define(models)


def test_children_are_those_that_a_look_at_every_process_finds() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo; wait"], stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()  # its child runs
        below = children(shell.pid)
        assert below == children_among_all(shell.pid, recursive=False)
        assert {shell.pid, *below} <= {*children_among_all(os.getpid(), recursive=True)}
        for pid in (*below, shell.pid):
            os.kill(pid, 9)
    assert children(shell.pid) == []
