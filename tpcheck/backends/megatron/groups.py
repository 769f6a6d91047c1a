"""Megatron's process groups: made in a copy of `parallel_state`, so that a program's groups stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import module_from_spec
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from megatron.core import parallel_state

from tpcheck.core.topology import Topology

Groups = Mapping[str, Any]  # the globals of parallel_state


def groups_of_topology(topology: Topology) -> Groups:
    """Make the groups of a topology. Collective over the world."""
    return _initialised_globals(topology.tp)


def groups_of_one_rank() -> Groups:
    """Make groups that hold this rank alone, whichever group a model asks for. Collective over the world."""
    state = _initialised_globals(1)
    single = state["_TENSOR_MODEL_PARALLEL_GROUP"]
    return {name: _replaced(value, single) for name, value in state.items()}


def _replaced(value: Any, single: dist.ProcessGroup) -> Any:
    """Return the group of one rank in place of a group, and its ranks in place of a list of ranks."""
    if isinstance(value, dist.ProcessGroup):
        return single
    if isinstance(value, list) and all(isinstance(rank, int) for rank in value):
        return dist.get_process_group_ranks(single)
    return value


def _initialised_globals(tp: int) -> Groups:
    """Initialise a copy of the module and return its globals."""
    spec = parallel_state.__spec__
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


@contextmanager
def use_groups(groups: Groups) -> Iterator[None]:
    """Make Megatron use these groups inside."""
    with patch.multiple(parallel_state, **groups):
        yield


@contextmanager
def destroy_new_groups() -> Iterator[None]:
    """Destroy the process groups created inside on leaving: a program may verify many models."""
    created: list[Any] = []
    new_group = dist.new_group

    def recording_new_group(*args: Any, **kwargs: Any) -> Any:
        created.append(new_group(*args, **kwargs))
        return created[-1]

    with patch.object(dist, "new_group", recording_new_group):
        yield
    for group in created:
        if isinstance(group, dist.ProcessGroup):  # else this rank is no member
            dist.destroy_process_group(group)
