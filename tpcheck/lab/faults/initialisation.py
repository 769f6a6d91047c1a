"""Mistakes in models that are made from scratch on shards, and right code that does so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tpcheck.backends.interface import RankLike
from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import TP2, TP2_DP2, TP4
from tpcheck.lab.faults.hand_written import HandWrittenControl, HandWrittenFault
from tpcheck.lab.faults.hand_written_model import COLUMN, LAYERS, ROW, Model, Style, inside
from tpcheck.numerics.checks import INITIALISATION_CHECK

_CHECKS = (INITIALISATION_CHECK,)
_COLUMNS = tuple(f"blocks.{number}.{name}" for number in range(LAYERS) for name in COLUMN)
_ROWS = tuple(f"blocks.{number}.{name}" for number in range(LAYERS) for name in ROW)

Generator = Callable[[RankLike], torch.Generator]
Initialise = Callable[[nn.Module, torch.Generator], object]  # a layer with its shard


def _seeded(offset: int) -> torch.Generator:
    """Return a generator of the seed of the run, and of this number."""
    return torch.Generator().manual_seed(torch.initial_seed() * 1000 + offset)


def _of_tp_rank(rank: RankLike) -> torch.Generator:
    return _seeded(1 + rank.topology.coordinate(rank.rank)["tp"])


def _of_dp_rank(rank: RankLike) -> torch.Generator:
    return _seeded(1 + rank.topology.coordinate(rank.rank)["dp"])


def _common(rank: RankLike) -> torch.Generator:
    return _seeded(0)


def _drawn(modules: tuple[str, ...], generator: Generator, initialise: Initialise, name: str) -> Style:
    """Return what initialises the weights of some modules on each rank, once they are cut."""

    def draw(model: Model, rank: RankLike) -> None:
        numbers = generator(rank)
        for module in modules:
            with torch.no_grad():
                initialise(model.get_submodule(module), numbers)

    draw.__name__ = name
    return draw


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _as_linear(module: nn.Module, generator: torch.Generator) -> None:
    """Draw as `nn.Linear` does, by the fan-in of what this rank holds."""
    nn.init.kaiming_uniform_(_weight(module), a=5**0.5, generator=generator)


def _xavier(module: nn.Module, generator: torch.Generator) -> None:
    nn.init.xavier_normal_(_weight(module), generator=generator)


def _normal(module: nn.Module, generator: torch.Generator) -> None:
    nn.init.normal_(_weight(module), generator=generator)


def _by_whole_fan(module: nn.Module, generator: torch.Generator, *, factor: int) -> None:
    """Draw as `nn.Linear` does, by the fan-in of the whole layer: `factor` times this rank's."""
    bound = (factor * _weight(module).shape[1]) ** -0.5
    nn.init.uniform_(_weight(module), -bound, bound, generator=generator)


def _left_out(module: nn.Module, generator: torch.Generator) -> None:
    nn.init.zeros_(_weight(module))


def _own_shards(model: Model, rank: RankLike) -> None:
    """Let each rank draw its shards as the whole layer is drawn, and replicas as all ranks do."""
    numbers = _of_tp_rank(rank)
    for modules, factor in ((_COLUMNS, 1), (_ROWS, rank.topology.tp)):
        _drawn(modules, lambda _: numbers, partial(_by_whole_fan, factor=factor), "")(model, rank)
    _drawn(("embedding",), _common, _normal, "")(model, rank)


def _row(
    name: str, what: str, inject: Style, places: tuple[str, ...], *causes: str, topology: Topology = TP2
) -> HandWrittenFault:
    return HandWrittenFault(
        name, what, inject, places, causes, checks=_CHECKS, kind="initialisation", topology=topology
    )


FAULTS = (
    _row("init_fan_in_of_shard", "row-parallel layers are drawn by the fan-in of one rank's shard",
         _drawn(_ROWS, _of_tp_rank, _as_linear, "fan_in_of_shard"), _ROWS, "init_depends_on_tp"),
    _row("init_fans_of_shard", "column-parallel layers are drawn by the sum of both fans of one rank's shard",
         _drawn(_COLUMNS, _of_tp_rank, _xavier, "fans_of_shard"), _COLUMNS, "init_depends_on_tp", topology=TP4),
    _row("init_shards_equal", "ranks of one seed draw their shards of column-parallel layers from it",
         _drawn(_COLUMNS, _common, _as_linear, "shards_equal"), _COLUMNS, "shard_repeated"),
    _row("init_replica_by_rank", "the embedding, which every rank holds, is drawn by each rank's own seed",
         _drawn(("embedding",), _of_tp_rank, _normal, "replica_by_rank"), ("embedding",), "replicas_drawn_apart"),
    _row("init_by_data_parallel_rank", "each data-parallel replica draws its weights by a seed of its own",
         _drawn((*_COLUMNS, "embedding"), _of_dp_rank, _normal, "by_dp_rank"), (*_COLUMNS, "embedding"),
         "replicas_drawn_apart", "init_depends_on_tp", "shard_repeated", topology=TP2_DP2),
    _row("init_left_out", "the weights of a layer stay as they were allocated",
         _drawn(_ROWS[:1], _common, _left_out, "left_out"), _ROWS[:1], "all_zero"),
)  # fmt: skip

CONTROLS = (
    HandWrittenControl(inside, checks=_CHECKS),
    HandWrittenControl(inside, topology=TP2_DP2, also=_own_shards, checks=_CHECKS),
)
