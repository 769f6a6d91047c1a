"""Warnings are filtered with pytest's filters, recorded, and issued again once."""

from __future__ import annotations

import re
import warnings

import pytest

from tpcheck.pytest_plugin.messages import (
    RankWarning,
    as_rank_warnings,
    current_filters,
    recorded_warnings,
    reissue_warnings,
)


def test_current_filters_apply_elsewhere() -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", "known", UserWarning)
        warnings.simplefilter("error", DeprecationWarning)
        filters = current_filters()
    with recorded_warnings(filters) as log:
        warnings.warn("known", UserWarning, stacklevel=1)
        warnings.warn("new", UserWarning, stacklevel=1)
        with pytest.raises(DeprecationWarning):
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert [(warning.category, warning.message) for warning in as_rank_warnings(log)] == [
        (("builtins", "UserWarning"), "new")
    ]


def test_a_filter_of_a_category_that_does_not_import_is_skipped() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        filters = tuple(entry for entry in current_filters() if entry.action == "always")
    unknown = tuple(type(entry)(entry.action, "", ("no_such_module", "Warning"), "", 0) for entry in filters)
    with recorded_warnings((*unknown, *filters)) as log:
        warnings.warn("shown", stacklevel=1)
    assert len(log) == 1


def test_a_warning_of_several_ranks_is_issued_once_with_its_location() -> None:
    warning = RankWarning(("builtins", "DeprecationWarning"), "old", "/home/me/layers.py", 7)
    with pytest.warns(DeprecationWarning, match=re.escape("old")) as caught:
        reissue_warnings([warning, warning])
    assert [(entry.filename, entry.lineno) for entry in caught] == [("/home/me/layers.py", 7)]


def test_a_category_of_a_module_that_is_not_imported_is_named_in_the_text() -> None:
    with pytest.warns(UserWarning, match="TorchWarning: slow"):
        reissue_warnings([RankWarning(("no_such_module", "TorchWarning"), "slow", "/home/me/layers.py", 7)])
