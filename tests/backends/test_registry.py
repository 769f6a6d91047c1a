"""Backends and checkpoint formats are found by entry point."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tpcheck import adapters
from tpcheck.backends import registry
from tpcheck.backends.layout import Layout
from tpcheck.backends.registry import backend_names, checkpoint_formats, layouts_of, load_backend
from tpcheck.core.errors import TpcheckError, UsageError


class MarkedBackend:
    """Reads the layouts of modules of the package that this test stands in for."""

    name = "marked"

    def layouts_of(self, model: nn.Module) -> dict[str, Layout]:
        return {name: Layout.replicated(parameter.shape, tp=2) for name, parameter in model.named_parameters()}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install backends under the names of packages: `torch` reads layouts, `absent` cannot be imported."""
    entries = {
        "torch": SimpleNamespace(name="torch", load=lambda: MarkedBackend),
        "absent": EntryPoint("absent", "no_such_package.backend:Backend", registry.BACKENDS),
    }
    monkeypatch.setattr(registry, "_entries", lambda group: entries)


def test_modules_of_this_packages_backends_alone_are_known() -> None:
    assert registry.modules_of("dtensor") == ("tpcheck.backends.dtensor",)
    assert registry.modules_of("nosuch") == ()


@pytest.mark.usefixtures("installed")
def test_the_module_of_another_packages_backend_is_left_to_the_ranks() -> None:
    assert registry.modules_of("absent") == ()


def test_installed_backends_are_found_by_entry_point() -> None:
    assert {"custom", "deepspeed", "deepspeed-tp-model-init", "dtensor", "transformers"} <= set(backend_names())


@pytest.mark.parametrize("name", backend_names())
def test_a_backend_has_the_name_of_its_entry_point(name: str) -> None:
    assert load_backend(name).name == name


def test_an_object_is_returned_as_it_is() -> None:
    backend: Any = MarkedBackend()
    assert load_backend(backend) is backend


def test_an_unknown_name_is_refused_with_the_installed_names() -> None:
    with pytest.raises(UsageError, match=r"backend='megatronn': expected one of custom, deepspeed"):
        load_backend("megatronn")


@pytest.mark.usefixtures("installed")
def test_a_backend_whose_package_is_missing_names_the_package() -> None:
    with pytest.raises(TpcheckError, match="backend 'absent' cannot be loaded: No module named 'no_such_package'"):
        load_backend("absent")


def test_formats_are_asked_in_the_order_of_their_precedence() -> None:
    precedences = [checkpoint_format.precedence for checkpoint_format in checkpoint_formats()]
    assert precedences == sorted(precedences, reverse=True)


@pytest.mark.usefixtures("installed")
def test_layouts_are_read_by_the_backend_of_the_package_that_the_modules_come_from() -> None:
    assert set(layouts_of(nn.Linear(2, 2))) == {"weight", "bias"}


def test_a_model_of_no_backends_package_has_no_layouts() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

    assert layouts_of(Own()) == {}


def test_the_names_of_version_0_1_still_work() -> None:
    assert adapters.TellsLayouts is adapters.ReadsLayouts
    assert adapters.NamedOtherwiseWhenSaved is adapters.RenamedWhenSaved
