"""Tensors in memory as those of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tpcheck import CheckpointError
from tpcheck.backends.checkpoint_format import Extent
from tpcheck.numerics.exact.checkpoint_tensor import CheckpointTensor


@dataclass(frozen=True)
class Tensors:
    """A checkpoint of tensors in memory, some of which lie in files, too, with anything that a format may add."""

    tensors: Mapping[str, torch.Tensor]
    extents: Mapping[str, Extent] = field(default_factory=dict)
    description: str = "tensors"
    config: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[frozenset[str], ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    inconsistent_replicas: Mapping[str, str] = field(default_factory=dict)
    has_changed: bool = False

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: range) -> torch.Tensor:
        return self.tensors[name][rows.start : rows.stop] if self.tensors[name].dim() else self.tensors[name]

    def extent(self, name: str) -> Extent | None:
        return self.extents.get(name)

    def require_unchanged(self) -> None:
        if self.has_changed:
            raise CheckpointError(f"{self.description} changed while they were read.")

    def close(self) -> None: ...


def stored(tensor: torch.Tensor, cast: torch.dtype | None = None) -> CheckpointTensor:
    return CheckpointTensor(Tensors({"a": tensor}), "a", cast)
