"""Process groups as global ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist


def distinct_ranks(process_groups: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each group, those of equal groups once."""
    return tuple(dict.fromkeys(tuple(dist.get_process_group_ranks(group)) for group in process_groups))
