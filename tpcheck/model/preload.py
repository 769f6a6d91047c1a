"""What the forkserver imports before the ranks of a verification are forked: each of them would import it anew."""

from __future__ import annotations

from tpcheck.backends.registry import modules_of
from tpcheck.core.check_names import RESUME_CHECK
from tpcheck.model.options import Request
from tpcheck.world.forkserver_client import TRAINER_PRELOAD, ZERO_PRELOAD

_OF_RESUMING = ("tpcheck.model.resuming", "tpcheck.backends.transformers")
"""For several worlds: 0.4 s a rank, most of it peft, which layouts of a live model of transformers ask for."""


def preload_of(request: Request) -> tuple[str, ...]:
    """Return the modules that ranks need for this request."""
    options = request.options
    backend_modules = modules_of(options.backend_name)
    return (
        "tpcheck.model.rank_run",
        *backend_modules,
        *(f"{module}.preload" for module in backend_modules),  # where a backend has one
        *(ZERO_PRELOAD if options.zero_stage else ()),
        *(TRAINER_PRELOAD if options.loop == "trainer" else ()),
        *(_OF_RESUMING if RESUME_CHECK in options.check_names else ()),
    )
