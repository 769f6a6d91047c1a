"""What is verified: a family, the configuration in a folder, or a function of the user's. Resolved here alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcheck.core.errors import UsageError
from tpcheck.core.guides import Guide
from tpcheck.core.memory import GIB, free_memory
from tpcheck.model.options import RunOptions
from tpcheck.model.user_code import CUSTOM, UserFunction, is_user_code

if TYPE_CHECKING:
    from tpcheck.families.build import FolderModel

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")  # settings of how a model is built
_HEADS = ("causal", "seq2seq", "masked", "multimodal")  # of `families.build`, which imports less without them
_COPIES = 4  # of all parameters that a rank holds at least: the reference, its first state, its gradients, moments


@dataclass(frozen=True, slots=True)
class Target:
    """What is verified.

    Attributes:
        name: As the user gave it; reports and commands repeat it.
        build: Makes the unsharded model, on every rank.
        subject: What the subject of a report says of it, beside the options of the run.
        notes: What of it does not take part, in sentences.
        spread_weights: Whether its weights are random, so that matrices may be drawn on another scale.
    """

    name: str
    build: Callable[[], Any]
    subject: Mapping[str, Any] = field(hash=False)
    notes: tuple[str, ...] = ()
    spread_weights: bool = True


def is_family(name: str) -> bool:
    """Return whether a target can be a family alone, as its text says, and is no folder here."""
    head = name.partition("/")[2]
    return not is_user_code(name) and (head in _HEADS or not _is_path_like(name)) and not _is_folder_beside(name)


def require_backend_for(name: str, options: RunOptions) -> None:
    """Raise UsageError if a target has no function that shards it, and the backend needs one."""
    if options.backend == CUSTOM and not is_user_code(name):
        accepted = f"another backend for {name}; {CUSTOM} is for file.py:build, with a function shard beside build"
        raise UsageError("backend", CUSTOM, accepted, Guide.OWN_MODEL)


def _is_path_like(name: str) -> bool:
    return "/" in name or os.sep in name or name[:1] in (".", "~") or name.endswith(".json")


def resolve(name: str, options: RunOptions) -> Target:
    """Return the target of this name under the options of a run.

    Args:
        name: A family (`llama`); a folder of transformers, its config.json, or a hub id in the local cache; or
            `file.py:function`, `package.module:function`.

    Raises:
        UsageError: There is no such target, or an option does not apply to it.
    """
    if is_user_code(name):
        return _user_code(name, options)
    require_backend_for(name, options)
    if is_family(name):
        return _family(name, options)
    return _folder(name, options)


def _is_folder_beside(name: str) -> bool:
    """Return whether a bare name is that of a folder here, and of no family."""
    if not Path(name).is_dir():
        return False
    from tpcheck.families.build import is_type

    return not is_type(name.partition("/")[0])


def _family(name: str, options: RunOptions) -> Target:
    from tpcheck.families.build import small_model, type_and_head

    type_and_head(name)
    if options.full:
        raise UsageError("full", True, f"False: {name} is a family, whose sizes are small; a folder has real ones")
    build = _with_lora(partial(small_model, name, options.settings), name, options)
    return Target(name, build, options.subject(name))


def _with_lora(build: Callable[[], Any], source: str | FolderModel, options: RunOptions) -> Callable[[], Any]:
    from tpcheck.families.adapters import with_adapters

    return partial(with_adapters, source, options.settings, options.lora) if options.lora else build


def _folder(name: str, options: RunOptions) -> Target:
    from tpcheck.families.build import small_model
    from tpcheck.families.folders import read_folder

    of_config = {key: value for key, value in options.settings.items() if key not in _IMPLEMENTATIONS}
    model = read_folder(name, of_config, tp=options.topology.tp, full=options.full)
    if options.full:
        _require_memory(model, options)
    subject = {
        **options.subject(model.family),
        "target": name,
        "shrunk": {key: list(sizes) for key, sizes in model.shrunk.items()},
        "configuration": dict(model.config),
    }
    build = _with_lora(partial(small_model, model, options.settings), model, options)
    return Target(name, build, subject, model.notes)


def _require_memory(model: FolderModel, options: RunOptions) -> None:
    """Raise UsageError where the ranks cannot hold the model at its real size."""
    import torch

    from tpcheck.families.build import small_model

    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in small_model(model).parameters())
    of_dtype = getattr(torch, options.dtype, None)
    size = of_dtype.itemsize if isinstance(of_dtype, torch.dtype) else 8
    world = options.topology.world_size
    needed, free = number * size * _COPIES * world / GIB, free_memory() / GIB
    if torch.cuda.device_count() < world and needed > free:
        raise UsageError(
            "full",
            True,
            f"False: {number / 1e9:.2f} billion parameters in {options.dtype} on {world} ranks of one machine need "
            f"more than {needed:.0f} GiB, and {free:.0f} GiB are free; without --full the sizes are made small",
        )


def _user_code(name: str, options: RunOptions) -> Target:
    for option, meaning in (("settings", "its configuration"), ("lora", "its adapters"), ("full", "its sizes")):
        if getattr(options, option):
            value = getattr(options, option)
            raise UsageError(option, value, f"none for {name}: the function that builds the model sets {meaning}")
    subject = {key: value for key, value in options.subject(name).items() if key not in ("family", "settings")}
    return Target(name, UserFunction.parse(name), {"target": name, **subject}, spread_weights=False)
