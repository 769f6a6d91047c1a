"""What the template imports, once, so that no rank has to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

# Packages that import lazily are named by the submodules that ranks reach within their first second.
DEFAULT: tuple[str, ...] = (
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
    "tpcheck.pytest_plugin.warm",
)

# What every rank of a DeepSpeed engine with ZeRO imports besides: an optimizer's decorators load TorchInductor.
OF_ZERO: tuple[str, ...] = ("deepspeed.runtime.zero.muon.muon_optimizer",)


def import_all(names: Sequence[str]) -> dict[str, str]:
    """Import what is installed; return the packages that are installed but broken, each with its error.

    Broken ones are left for the rank that needs them: it fails with the real error, in its own traceback.
    """
    broken: dict[str, str] = {}
    for name in names:
        package = name.partition(".")[0]
        if package not in sys.modules and find_spec(package) is None:
            continue
        try:
            import_module(name)
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    return broken
