"""How AutoTP cut each parameter, from the `universal_checkpoint_info` that DeepSpeed saves beside the weights.

Its patterns are regular expressions. Only those that match one literal name are used, so that no regular expression of
a hostile file is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tpcheck.checkpoints.formats.deepspeed.merge_tp_shards import (
    LayoutError,
    MergedTensor,
    Shard,
    StridedPiece,
    cut_into_pieces,
)
from tpcheck.checkpoints.formats.deepspeed.rank_files import mapping, sequence
from tpcheck.checkpoints.formats.files import is_size, is_sizes

AFFINE_VERSION = 1
"""Version of `affine_map`, written since DeepSpeed 0.19.7; the keys of a later one may mean something else."""

Shapes = Sequence[tuple[int, ...]]


class AutoTPLayouts:
    """The layouts that a file states; an empty mapping states none."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        maps = mapping(info.get("affine_map"))
        self._maps = mapping(maps.get("params")) if maps.get("version") == AFFINE_VERSION else {}
        self._unsupported = mapping(info.get("autotp_unsupported_parameter_patterns"))
        self._replicated = _names(info.get("tp_replicated_parameter_patterns"))
        self._by_row = _names(info.get("parameter_with_row_parallelism_patterns"))
        self._widths = mapping(info.get("sub_param_shard_widths"))
        self._block_dims = {
            name: block.get("partition_dim")
            for block in map(mapping, sequence(info.get("parameter_with_sub_params")))
            for name in _names(block.get("patterns"))
        }
        # Where a file lists replicated parameters, those not mentioned in it are cut along dim 0 (ds_to_universal).
        self._lists_replicated = bool(self._replicated)

    def merge(self, name: str, shards: Sequence[Shard]) -> MergedTensor | None:
        """Return the full parameter, or None where the file does not state how it was cut.

        Raises:
            LayoutError: The layout that the file states is not valid.
        """
        pattern = f"^{re.escape(name)}$"
        if pattern in self._unsupported:
            reason = self._unsupported[pattern]
            raise LayoutError(f"DeepSpeed does not support its layout: {reason if isinstance(reason, str) else ''}")
        if pattern in self._maps:
            return _by_map(self._maps[pattern], shards)
        if pattern in self._replicated:
            return _replicated(shards)
        if pattern in self._block_dims:
            if pattern not in self._widths:
                return None
            return _by_widths(shards, self._block_dims[pattern], self._widths[pattern])
        if self._lists_replicated:
            return _cut(shards, 1 if pattern in self._by_row else 0)
        return None


def _replicated(shards: Sequence[Shard]) -> MergedTensor:
    if len({shard.shape for shard in shards}) > 1:
        shapes = " and ".join(str(list(shard.shape)) for shard in shards)
        raise LayoutError(f"it should be replicated, but its shapes are {shapes}")
    return MergedTensor.replicated(shards)


def _cut(shards: Sequence[Shard], dim: int) -> MergedTensor:
    if any(len(shard.shape) <= dim for shard in shards):
        raise LayoutError(f"it should be cut along dim {dim}, which it does not have")
    return _by_widths(shards, dim, [[shard.shape[dim] for shard in shards]])


def _by_widths(shards: Sequence[Shard], dim: Any, widths: Any) -> MergedTensor:
    if not (type(dim) is int and isinstance(widths, list) and widths):
        raise LayoutError("its sub-parameters have no sizes")
    if not all(isinstance(block, list) and len(block) == len(shards) and all(map(is_size, block)) for block in widths):
        raise LayoutError("its sub-parameters do not state the share of each rank")
    if not 0 <= dim < len(shards[0].shape):
        raise LayoutError(f"it should be cut along dim {dim}, which it does not have")
    total = sum(map(sum, widths))
    shape = tuple(total if i == dim else size for i, size in enumerate(shards[0].shape))
    shapes, pieces = cut_into_pieces(shape, dim, widths)
    _require_shapes(shards, shapes)
    return MergedTensor.of(shape, shards, pieces)


def _by_map(entry: Any, shards: Sequence[Shard]) -> MergedTensor:
    ranks = mapping(mapping(entry).get("ranks"))
    shape = _sizes(mapping(entry).get("logical_shape"))
    if set(ranks) != set(range(len(shards))):
        raise LayoutError(f"it was cut for ranks {sorted(map(str, ranks))}, but there are {len(shards)}")
    _require_shapes(shards, [_sizes(mapping(ranks[rank]).get("shard_shape")) for rank in range(len(shards))])
    return MergedTensor.of(
        shape, shards, [_pieces(mapping(ranks[rank]), rank, shards[rank]) for rank in range(len(shards))]
    )


def _pieces(entry: Mapping[Any, Any], rank: int, shard: Shard) -> list[StridedPiece]:
    pieces = [_piece(mapping(piece)) for piece in sequence(entry.get("pieces"))]
    numel = sum(piece.numel for piece in pieces)
    if numel != shard.numel:
        raise LayoutError(f"rank {rank} holds {shard.numel} elements, but its pieces have {numel}")
    return pieces


def _piece(entry: Mapping[Any, Any]) -> StridedPiece:
    full, shard, scale = entry.get("source"), entry.get("dest"), entry.get("scale", 1.0)
    if not all(isinstance(side, (list, tuple)) and len(side) == 2 and is_size(side[0]) for side in (full, shard)):
        raise LayoutError("one of its pieces has no offset or strides")
    if not isinstance(scale, (int, float)) or not 0 < abs(scale) < float("inf"):
        raise LayoutError("one of its pieces has no scale")
    assert full is not None
    assert shard is not None
    return StridedPiece(_sizes(entry.get("shape")), full[0], _sizes(full[1]), shard[0], _sizes(shard[1]), float(scale))


def _require_shapes(shards: Sequence[Shard], shapes: Shapes) -> None:
    for rank, (shard, shape) in enumerate(zip(shards, shapes, strict=True)):
        if shard.shape != tuple(shape):
            raise LayoutError(f"rank {rank} holds the shape {list(shard.shape)}, but the layout states {list(shape)}")


def _names(value: Any) -> frozenset[str]:
    return frozenset(name for name in sequence(value) if isinstance(name, str))


def _sizes(value: Any) -> tuple[int, ...]:
    if not is_sizes(value):
        raise LayoutError("one of its shapes is not made of sizes")
    return tuple(value)
