"""Megatron's process groups, which are globals of its `parallel_state`: sets of them, to be put in and taken out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import module_from_spec
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from megatron.core import parallel_state

from tpcheck.topology import Topology

Groups = Mapping[str, Any]  # the globals of parallel_state


def of_topology(topology: Topology) -> Groups:
    """Make the groups of a topology. Collective over the world."""
    return _initialised(topology.tp)


def of_one_rank() -> Groups:
    """Make groups of this rank alone: whatever a model asks for, it is the only one. Collective over the world."""
    made = _initialised(1)
    own = made["_TENSOR_MODEL_PARALLEL_GROUP"]
    return {name: _alone(value, own) for name, value in made.items()}


@contextmanager
def ended_groups() -> Iterator[None]:
    """Destroy the process groups that are made inside when it ends: a program may verify many models."""
    made: list[Any] = []
    new_group = dist.new_group

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(new_group(*args, **kwargs))
        return made[-1]

    with patch.object(dist, "new_group", noted):
        yield
    for group in made:
        if isinstance(group, dist.ProcessGroup):  # else this rank is no member
            dist.destroy_process_group(group)


@contextmanager
def entered(groups: Groups) -> Iterator[None]:
    """Make these the groups that Megatron uses, while inside."""
    with patch.multiple(parallel_state, **groups):
        yield


def _initialised(tp: int) -> Groups:
    """Return the globals of a copy of the module that has been initialised: those of the program stay as they are."""
    spec = parallel_state.__spec__
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    return {
        name: value
        for name, value in vars(copy).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def _alone(value: Any, own: dist.ProcessGroup) -> Any:
    if isinstance(value, dist.ProcessGroup):
        return own
    if isinstance(value, list) and all(isinstance(one, int) for one in value):
        return dist.get_process_group_ranks(own)
    return value
