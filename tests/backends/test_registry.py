"""Backends are found by entry point."""

import pytest

from tpcheck.backends.registry import backend_names, load_backend
from tpcheck.core.errors import UsageError


def test_our_backends_are_found_by_entry_point() -> None:
    assert {"deepspeed", "deepspeed-tp-model-init"} <= set(backend_names())


@pytest.mark.parametrize("name", backend_names())
def test_a_backend_bears_the_name_of_its_entry_point(name: str) -> None:
    assert load_backend(name).name == name


def test_an_unknown_backend_is_told_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"backend='megatronn': expected one of custom, deepspeed"):
        load_backend("megatronn")
