"""Models of peft, whichever backend shards them: recognised, saved, and cut by the plan of the model inside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn


def is_peft_model(model: nn.Module) -> bool:
    """Return whether this is a model of peft, which is not imported for the question."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def peft_version(model: nn.Module) -> dict[str, str]:
    """Return the version of peft where it has made the model."""
    return {"peft": sys.modules["peft"].__version__} if is_peft_model(model) else {}


def ways_to_save_adapters(model: Any) -> dict[str, Callable[[Path], None]]:
    """Return the public way to save the adapters of a model of peft; none of any other model."""
    return {"save_pretrained": lambda folder: model.save_pretrained(str(folder))} if is_peft_model(model) else {}


_PREFIX = "base_model.model"  # PeftModel.base_model is a LoraModel, whose `model` is the user's (peft 0.21.2)


def plan_around_adapters(model: Any, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan of the model inside, by the names of the layers that peft has put around its own.

    Behind a column-parallel layer `lora_B` is column-parallel, and `lora_A` whole; before a row-parallel one `lora_A`
    is row-parallel, and `lora_B` whole. Then the delta lies as the layer's output does, and is summed where it is.
    """
    modules = dict(model.get_submodule(_PREFIX).named_modules())
    new_plan: dict[str, Any] = {}
    for pattern, style in plan.items():
        for name in (name for name in modules if _matches(name, pattern)):
            for part in _parts(modules[name], style):
                new_plan[".".join([_PREFIX, name, *part])] = style
    return new_plan


def _parts(layer: Any, style: Any) -> Iterator[tuple[str, ...]]:
    """Yield the parts of a layer that lie as the plan says of it: the layer itself, where peft has left it."""
    if not hasattr(layer, "base_layer"):
        yield ()
        return
    yield ("base_layer",)
    side = "lora_A" if str(style).startswith("rowwise") else "lora_B"
    for adapter in getattr(layer, side, ()):
        yield (side, adapter)


def _matches(name: str, pattern: str) -> bool:
    """Return whether torch's `parallelize_module` takes the pattern for this name: each part for itself."""
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))
