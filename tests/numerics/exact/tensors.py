"""Tensors in memory as those of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tpcheck.backends.checkpoint_format import Extent
from tpcheck.numerics.exact.checkpoint_tensor import CheckpointTensor


@dataclass
class Tensors:
    """A checkpoint of tensors in memory, some of which lie in files, too."""

    tensors: dict[str, torch.Tensor]
    extents: dict[str, Extent] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: range) -> torch.Tensor:
        return self.tensors[name][rows.start : rows.stop] if self.tensors[name].dim() else self.tensors[name]

    def extent(self, name: str) -> Extent | None:
        return self.extents.get(name)


def stored(tensor: torch.Tensor, cast: torch.dtype | None = None) -> CheckpointTensor:
    return CheckpointTensor(Tensors({"a": tensor}), "a", cast)  # type: ignore[arg-type]
