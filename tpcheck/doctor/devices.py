"""What there is to run ranks on."""

from __future__ import annotations

from tpcheck.environment import num_cores


def devices() -> tuple[str, ...]:
    """Return the processors and accelerators that a world could use, in words. Imports torch."""
    found = [f"{num_cores()} CPU cores"]
    try:
        import torch
    except ImportError:
        return tuple(found)
    return (*found, *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())))
