"""Replaces how the sharded model computes: its attention, its experts, what it recomputes, what it compiles.

The reference stays as it was built, eager; so each implementation is compared with the same mathematics.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tpcheck.backends.interface import TrainingOptions
from tpcheck.core.errors import UsageError
from tpcheck.numerics.recorder import is_compiled

EAGER = "eager"
_OF_A_TRANSFORMERS_MODEL = "None: only a model of transformers can be given another one; yours has its own"


def replace_implementations(model: nn.Module, options: TrainingOptions) -> None:
    """Give a sharded model the attention, the experts and the checkpointing that the options ask for.

    Raises:
        UsageError: The model has no such implementation, or would go on with its own.
    """
    if options.attention is not None:
        device = next((parameter.device.type for parameter in model.parameters()), "cpu")
        if options.attention == "flex_attention" and device == "cpu":
            raise UsageError(
                "attention", options.attention, "eager, sdpa: torch's FlexAttention has no backward pass on a CPU"
            )
        _set(model, "attention", options.attention, "set_attn_implementation", "_attn_implementation")
    if options.experts is not None:
        if options.experts == "grouped_mm" and str(options.dtype) == "torch.float64":
            raise UsageError(
                "experts", options.experts, "eager, batched_mm: torch's grouped_mm takes no float64; or another dtype"
            )
        _set(model, "experts", options.experts, "set_experts_implementation", "_experts_implementation")
    if options.checkpointing:
        _checkpoint(model, reentrant=options.reentrant)


def compiled_modules(model: nn.Module, options: TrainingOptions) -> dict[str, nn.Module]:
    """Return the modules that the options ask to compile, by name: the model, or each of its layers.

    Raises:
        UsageError: The model has no layers.
    """
    if not options.compile and not options.compile_layers:
        return {}
    if not options.compile_layers:
        return {"": model}
    layers = {
        f"{name}.{number}": layer
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for number, layer in module.named_children()
    }
    outermost = {name: layer for name, layer in layers.items() if not any(is_inside(name, other) for other in layers)}
    if not outermost:
        raise UsageError("compile_layers", True, "False: this model has no nn.ModuleList of layers; compile it whole")
    return outermost


def compile_module(module: nn.Module) -> None:
    """Compile a module, but not the hooks that it has.

    torch 2.13 compiles hooks with the module; DeepSpeed's comparison of batches, a hook that pickles them, then fails
    under a torch function mode, such as that of `everything_in_float64` (a tensor's device is None).
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(hooks.items()):
            hooks[number] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    module.compile()


def run_eagerly(model: nn.Module) -> None:
    """Undo the compiling of a model that compiles itself, so that it can stand for the eager reference."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if is_compiled(module):
            module._compiled_call_impl = None
            if (original := getattr(module, "_orig_mod", None)) is not None:
                module.__dict__["forward"] = original.__call__


def num_compiled_graphs() -> int:
    """Return how many graphs torch has compiled in this process."""
    counters: Any = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return 0 if counters is None else int(counters["frames"]["ok"])


def require_compiled(options: TrainingOptions, num_graphs: int) -> None:
    """Raise UsageError where the options ask for compiling, and torch compiled no graph: nothing would be verified."""
    if (options.compile or options.compile_layers) and not num_graphs:
        name = "compile_layers" if options.compile_layers else "compile"
        raise UsageError(name, True, "False: torch compiled nothing of this model (TORCH_LOGS=graph_breaks says why)")


def is_inside(name: str, other: str) -> bool:
    """Return whether a module lies in another one, by their names."""
    return name != other and (not other or name.startswith(f"{other}."))


def _set(model: Any, option: str, name: str, method: str, attribute: str) -> None:
    config = getattr(model, "config", None)
    if not hasattr(model, method) or config is None:
        raise UsageError(option, name, _OF_A_TRANSFORMERS_MODEL)
    try:
        getattr(model, method)(name)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UsageError(option, name, f"one that this model has ({_first_sentence(error)})") from error
    configs = list(_configs(config))
    if any(getattr(each, attribute, name) != name for each in configs):
        actual = next(value for each in configs if (value := getattr(each, attribute, name)) != name)
        raise UsageError(option, name, f"{actual}: {type(model).__name__} keeps its own")


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (nested := getattr(config, name, None)) is not None:
            yield from _configs(nested)


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def _checkpoint(model: Any, *, reentrant: bool) -> None:
    enable: Callable[..., None] | None = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise UsageError(
            "checkpointing", True, "False: transformers' models alone take this option; yours decides by itself"
        )
    try:
        enable({"use_reentrant": reentrant})
    except ValueError as error:
        raise UsageError("checkpointing", True, f"False for this model ({_first_sentence(error)})") from error
    modules: Iterator[nn.Module] = model.modules()
    if not any(getattr(module, "gradient_checkpointing", False) for module in modules):
        raise UsageError("checkpointing", True, f"False: no module of {type(model).__name__} recomputes anything")
