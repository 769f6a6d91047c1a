"""Ways to make a model from scratch that several backends share, and what stands in for random numbers of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.tensor import _random

from tpcheck.backends.interface import Backend, RankLike, TrainingOptions, WayToInitialise

BUILT_THEN_SHARDED = "built, then sharded"
"""The way to make a model from scratch that every backend has."""


class NotInitialised(Exception):
    """A way to make a model from scratch does not exist for this model; the message says why, as a sentence."""


def built_then_sharded(
    backend: Backend, build: Callable[[], nn.Module], rank: RankLike, options: TrainingOptions
) -> WayToInitialise:
    """Return the way in which each rank builds the unsharded model, and the backend shards it."""

    def unsharded(seed: int) -> nn.Module:
        return build().to(rank.device, options.dtype)

    return WayToInitialise(unsharded, lambda seed: backend.shard(unsharded(seed), rank, options))


@contextmanager
def random_dtensors_on_cpu() -> Iterator[None]:
    """Let random operations on DTensors draw on a CPU as they do on a GPU.

    torch has a generator for DTensors on GPUs alone: each shard has its part of one stream. On a CPU every rank would
    draw its shard from its own generator, and ranks of one seed would draw equal shards
    (torch/distributed/tensor/_random.py, `is_rng_supported_mesh`).
    """
    with patch.object(_random, "_rng_tracker", _CpuGenerator()):
        yield


_FAR_APART = 0x9E3779B1  # 2**32 over the golden ratio: multiples of it are far from each other modulo 2**32


class _CpuGenerator:
    """Gives each shard random numbers of its own, the same on ranks that hold the same shard."""

    distribute_region_enabled = True

    @contextmanager
    def _distribute_region(self, spec: Any, generator: torch.Generator | None = None) -> Iterator[None]:
        common = int(torch.randint(2**31, (), generator=generator))  # advances on all ranks alike
        number = 0
        for dim, placement in enumerate(spec.placements):
            if not placement.is_replicate():
                number = number * spec.mesh.size(dim) + spec.mesh.get_local_rank(dim)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((common + number * _FAR_APART) % 2**32)  # of which it takes 32 bits
            yield
