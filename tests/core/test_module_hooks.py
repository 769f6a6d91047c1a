"""Copies of a module, and files that it is saved in, have none of the hooks of tpcheck."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tpcheck.core.module_hooks import HiddenHooks


def keep(module: nn.Module, args: Any, output: Any = None) -> None:
    """What a user's hook does."""


class WithoutCache(nn.Linear):
    """Leaves something out of what is saved, as classes do that hold what does not pickle."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cache"}


def hooked(module: nn.Module) -> HiddenHooks:
    hooks = HiddenHooks()
    for each in module.modules():
        hooks.add(each, each.register_forward_pre_hook(lambda *args: None, with_kwargs=True))
        hooks.add(each, each.register_forward_hook(lambda *args: None, always_call=True))
    return hooks


def num_hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied", [saved_and_loaded, copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_has_the_users_hooks_alone(copied: Any) -> None:
    module = WithoutCache(3, 3)
    module.register_forward_hook(keep)
    module.cache = lambda: None  # type: ignore[assignment]
    hooks = hooked(module)
    second = hooked(module)
    twin = copied(module)
    assert list(twin._forward_hooks.values()) == [keep]
    assert vars(twin).keys() == vars(module).keys() - {"cache", "__getstate__"}
    assert not twin._forward_pre_hooks
    assert not twin._forward_hooks_always_called
    assert not twin._forward_pre_hooks_with_kwargs
    assert torch.equal(twin(torch.ones(3)), module(torch.ones(3)))
    hooks.remove()
    assert num_hooks(copied(module)) == 1
    second.remove()
    assert "__getstate__" not in vars(module)
    assert num_hooks(module) == 1


def test_copies_of_children_have_no_hooks_either() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2)))
    hooks = hooked(module)
    assert num_hooks(module) == 8
    assert [
        num_hooks(each) for each in (saved_and_loaded(module), copy.deepcopy(module), copy.deepcopy(module[1]))
    ] == [0] * 3
    hooks.remove()


def test_a_class_that_is_copied_by_its_own_method_is_left_alone() -> None:
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    hooks = hooked(module)
    assert "__getstate__" not in vars(module)
    copy.deepcopy(module)
    hooks.remove()
    assert num_hooks(saved_and_loaded(module)) == 0
