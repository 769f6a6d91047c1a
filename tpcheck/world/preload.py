"""What the forkserver imports once, so that no rank has to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

# Packages that import lazily are named by the submodules that ranks reach within their first second.
DEFAULT_PRELOAD: tuple[str, ...] = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.utils.data",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.engine",
    "deepspeed.module_inject.auto_tp",
    "cloudpickle",
    "pytest",
    "hypothesis",
    "tpcheck.pytest_plugin.preload",
)

# Imported by every rank of a DeepSpeed engine with ZeRO: the decorators of an optimizer load TorchInductor.
ZERO_PRELOAD: tuple[str, ...] = ("deepspeed.runtime.zero.muon.muon_optimizer",)


def import_all(names: Sequence[str]) -> dict[str, str]:
    """Import the modules that are installed; return those that fail to import, each with its error.

    A rank that needs such a module imports it again and fails with the error in its own traceback.
    """
    import_errors: dict[str, str] = {}
    for name in names:
        package = name.partition(".")[0]
        if package not in sys.modules and find_spec(package) is None:
            continue
        try:
            import_module(name)
        except Exception as error:
            import_errors[name] = f"{type(error).__name__}: {error}"
    return import_errors
