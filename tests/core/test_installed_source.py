"""What the source of installed packages says is what they say once they are imported."""

from __future__ import annotations

import gc
import inspect
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest
import torch

from tpcheck.core.errors import UsageError
from tpcheck.core.installed_source import _tree, fields_of, imported_names, keys_of, parameters_of
from tpcheck.core.optimizers import require_optimizer, torch_optimizers
from tpcheck.families.adapters import require_lora
from tpcheck.families.build import HEADS


def test_the_optimizers_of_torch_and_their_options_are_those_that_it_has() -> None:
    from tpcheck.backends.optimizer import optimizer_class

    classes = {name for name, value in vars(torch.optim).items() if isinstance(value, type)}
    assert set(torch_optimizers()) == classes - {"Optimizer", "LBFGS", "SparseAdam"}
    for name, module in torch_optimizers().items():
        assert list(parameters_of(module, name) or ()) == list(inspect.signature(optimizer_class(name)).parameters)


def test_the_types_of_transformers_are_those_that_it_has() -> None:
    modeling_auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    for head in HEADS:
        assert set(keys_of("transformers.models.auto.modeling_auto", head.mapping)) == set(
            getattr(modeling_auto, head.mapping)
        )


def test_the_fields_of_adapters_are_those_that_peft_has() -> None:
    peft = pytest.importorskip("peft")
    for field in fields(peft.LoraConfig):
        if field.name not in ("r", "target_modules"):
            require_lora({"r": 2, field.name: None})
    with pytest.raises(UsageError, match=r"lora\['rr'\]"):
        require_lora({"rr": 2})


def test_a_source_that_is_not_there_says_nothing() -> None:
    assert imported_names("no_such_package.module") == ()
    assert fields_of("torch.no_such_module", "Class") == ()
    assert parameters_of("torch.optim.sgd", "NoSuchClass") is None


def test_without_a_source_any_optimizer_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpcheck.core.optimizers.torch_optimizers", dict)
    require_optimizer("nosuch", ["lrr"])


def test_threads_read_source_at_once() -> None:
    """As the jobs of a matrix do. What is called at a garbage collection lets another thread run."""
    modules = [f"torch.{name}" for name in ("nn.functional", "storage", "serialization", "_tensor", "hub", "library")]

    def switch(*_: object) -> None:
        time.sleep(0)

    _tree.cache_clear()
    gc.callbacks.append(switch)
    try:
        with ThreadPoolExecutor(len(modules)) as threads:
            assert all(threads.map(imported_names, modules))
    finally:
        gc.callbacks.remove(switch)
