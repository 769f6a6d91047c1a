"""The optimizers of torch.optim by name, as its source says, and those whose step needs a whole matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tpcheck.core.errors import UsageError
from tpcheck.core.installed_source import bases_of, imported_names, parameters_of

OPTIMIZERS_OF_WHOLE_MATRICES = ("muon", "adafactor", "lamb", "shampoo", "soap", "came", "lars")
"""Optimizers whose step on an element depends on the whole matrix: on a shard they compute something else."""

NEEDS_A_CLOSURE_OR_SPARSE_GRADIENTS = ("LBFGS", "SparseAdam")


def needs_whole_matrices(name: str) -> bool:
    """Return whether the name is that of such an optimizer.

    Example:
        >>> needs_whole_matrices("OneBitLamb"), needs_whole_matrices("AdamW")
        (True, False)
    """
    return any(known in name.lower() for known in OPTIMIZERS_OF_WHOLE_MATRICES)


def torch_optimizers() -> Mapping[str, str]:
    """Return the names of the optimizers that take a plain step, with the modules that define them. Imports nothing.

    Empty where torch's source has another form than it has today.
    """
    imported = {name: module for module, name in imported_names("torch.optim")}
    bases = {"Optimizer", *imported}
    return {
        name: module
        for name, module in imported.items()
        if name not in NEEDS_A_CLOSURE_OR_SPARSE_GRADIENTS and bases.intersection(bases_of(module, name))
    }


def require_optimizer(name: str, params: Iterable[str] = (), *, source: Any = None) -> None:
    """Check a name of an optimizer, and the names of its options, without importing torch.

    Args:
        name: A class of torch.optim, in any case.
        params: The names of the options that are given.
        source: What the user wrote, for the message.

    Raises:
        UsageError: torch.optim has no such optimizer that takes a plain step, or it takes no such option.
    """
    known = torch_optimizers()
    written = next((each for each in known if each.lower() == name.lower()), None)
    if known and written is None:
        raise UsageError("optimizer", name, sorted(known))
    accepted = () if written is None else (parameters_of(known[written], written) or ())
    options = accepted[1:]  # the first are the parameters of the model
    for param in params if options else ():
        if param not in options:
            raise UsageError("optimizer", source, f"options that {written} takes, {', '.join(options)}: not {param}")
