"""Models and names without the wrappers of engines, DistributedDataParallel, torch.compile and peft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from tpcheck.core.errors import UsageError

# Where a wrapper keeps the module that it wraps. `module`: DistributedDataParallel, engines of DeepSpeed, Megatron's
# DistributedDataParallel and Float16Module; the others: torch.compile, FullyShardedDataParallel, checkpoint_wrapper.
_OUTERMOST = "module"
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PEFT = "base_model.model."  # PeftModel.base_model is a LoraModel, whose `model` is the user's (peft 0.21.2)


def unwrapped(model: Any) -> nn.Module:
    """Return the innermost module that is wrapped; a module that is not wrapped is returned as it is.

    A peft model stays: its adapters are parameters, too.

    Raises:
        UsageError: It is neither a module nor an engine around one.
    """
    while True:
        inner = _wrapped(model)
        if inner is None:
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise UsageError("model", type(model).__name__, "a torch.nn.Module or an engine around one")
    return model


def _wrapped(model: Any) -> nn.Module | None:
    """Return the only child of a wrapper that has no parameter of its own."""
    if not isinstance(model, nn.Module):
        inner = getattr(model, _OUTERMOST, None)
        return inner if isinstance(inner, nn.Module) else None
    children = dict(model.named_children())
    name = next(iter(children), "")
    if len(children) != 1 or name not in (_OUTERMOST, *_ANYWHERE):
        return None
    return None if any(True for _ in model.parameters(recurse=False)) else children[name]


def unwrapped_name(name: str) -> str:
    """Return the name of a parameter, buffer or module without the parts that wrappers add.

    Example:
        >>> unwrapped_name("module._orig_mod.layers.0._checkpoint_wrapped_module.mlp.weight")
        'layers.0.mlp.weight'
        >>> unwrapped_name("base_model.model.model.layers.0.q_proj.base_layer.weight")
        'model.layers.0.q_proj.base_layer.weight'
    """
    parts = [part for part in name.split(".") if part not in _ANYWHERE]
    while len(parts) > 1 and parts[0] == _OUTERMOST:
        del parts[0]
    return ".".join(parts).removeprefix(_PEFT)


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Return the names without wrappers by the given ones; where two would be equal, both are left as they are."""
    stripped = {name: unwrapped_name(name) for name in names}
    counted = Counter(stripped.values())
    return {name: short if counted[short] == 1 else name for name, short in stripped.items()}
