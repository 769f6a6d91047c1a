"""The libraries that tpcheck works with and does not require, and what to install for each."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# The extra of pyproject.toml that brings a package.
_EXTRAS = {
    "accelerate": "transformers",
    "deepspeed": "deepspeed",
    "hypothesis": "fuzz",
    "lightning": "lightning",
    "megatron": "megatron",
    "pytorch_lightning": "lightning",
    "safetensors": "transformers",
    "transformers": "transformers",
}


def is_missing(package: str) -> bool:
    """Return whether it is one of these packages, and not installed. Imports nothing."""
    return package in _EXTRAS and package not in sys.modules and find_spec(package) is None


def install_command(module: str) -> str | None:
    """Return the command that installs the package of a module, None for a package that no extra brings.

    Example:
        >>> install_command("megatron.core")
        "pip install 'tpcheck[megatron]'"
    """
    extra = _EXTRAS.get(module.partition(".")[0])
    return None if extra is None else f"pip install 'tpcheck[{extra}]'"


def missing_package(error: ImportError) -> str | None:
    """Return a sentence for an import that fails because one of these packages is not installed, None for others."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not is_missing(package):
        return None
    return f"{package} is not installed: {install_command(package)}"
