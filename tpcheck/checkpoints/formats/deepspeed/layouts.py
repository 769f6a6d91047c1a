"""How AutoTP cut each parameter, from the `universal_checkpoint_info` that DeepSpeed saves beside the weights.

Its patterns are regular expressions; only those that spell out one name are taken, so none of a hostile file is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tpcheck.checkpoints.formats.deepspeed.boxes import LayoutError, Strided, strided_cut
from tpcheck.checkpoints.formats.deepspeed.folder import is_size, is_sizes, mapping
from tpcheck.checkpoints.formats.deepspeed.shards import Merged, Shard

AFFINE_VERSION = 1
"""Of `affine_map`, written since DeepSpeed 0.19.7; a later one may mean something else by the same words."""

Shapes = Sequence[tuple[int, ...]]


class Layouts:
    """What the file says of each parameter; a file that says nothing is an empty mapping."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        maps = info.get("affine_map")
        known = isinstance(maps, Mapping) and maps.get("version") == AFFINE_VERSION
        self._maps = mapping(maps.get("params")) if isinstance(maps, Mapping) and known else {}
        self._unsupported = mapping(info.get("autotp_unsupported_parameter_patterns"))
        self._replicated = _names(info.get("tp_replicated_parameter_patterns"))
        self._by_row = _names(info.get("parameter_with_row_parallelism_patterns"))
        self._widths = mapping(info.get("sub_param_shard_widths"))
        blocks = info.get("parameter_with_sub_params")
        self._block_dims = {
            name: block.get("partition_dim")
            for block in (blocks if isinstance(blocks, list) else ())
            if isinstance(block, Mapping)
            for name in _names(block.get("patterns"))
        }
        # Files that list what is replicated cut everything else that they do not mention along dim 0 (ds_to_universal).
        self._lists_replicated = bool(self._replicated)

    def merged(self, name: str, shards: Sequence[Shard]) -> Merged | None:
        """Return the whole parameter, or None where the file does not say how it was cut.

        Raises:
            LayoutError: What it says cannot be followed.
        """
        pattern = f"^{re.escape(name)}$"
        if pattern in self._unsupported:
            reason = self._unsupported[pattern]
            raise LayoutError(f"DeepSpeed cannot say how it is cut: {reason if isinstance(reason, str) else ''}")
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


def _replicated(shards: Sequence[Shard]) -> Merged:
    if len({shard.shape for shard in shards}) > 1:
        shapes = " and ".join(str(list(shard.shape)) for shard in shards)
        raise LayoutError(f"it is said to be whole on every rank, and has shapes {shapes}")
    return Merged.replicated(shards)


def _cut(shards: Sequence[Shard], dim: int) -> Merged:
    if any(len(shard.shape) <= dim for shard in shards):
        raise LayoutError(f"it is said to be cut along dim {dim}, which it does not have")
    return _by_widths(shards, dim, [[shard.shape[dim] for shard in shards]])


def _by_widths(shards: Sequence[Shard], dim: Any, widths: Any) -> Merged:
    if not (type(dim) is int and isinstance(widths, list) and widths):
        raise LayoutError("its sub-parameters have no sizes")
    if not all(isinstance(block, list) and len(block) == len(shards) and all(map(is_size, block)) for block in widths):
        raise LayoutError("its sub-parameters do not say what each rank holds")
    if not 0 <= dim < len(shards[0].shape):
        raise LayoutError(f"it is said to be cut along dim {dim}, which it does not have")
    total = sum(map(sum, widths))
    shape = tuple(total if i == dim else size for i, size in enumerate(shards[0].shape))
    shapes, pieces = strided_cut(shape, dim, widths)
    _require_shapes(shards, shapes)
    return Merged.of(shape, shards, pieces)


def _by_map(entry: Any, shards: Sequence[Shard]) -> Merged:
    ranks = mapping(mapping(entry).get("ranks"))
    shape = _sizes(mapping(entry).get("logical_shape"))
    if set(ranks) != set(range(len(shards))):
        raise LayoutError(f"it was cut for ranks {sorted(map(str, ranks))}, and there are {len(shards)}")
    _require_shapes(shards, [_sizes(mapping(ranks[rank]).get("shard_shape")) for rank in range(len(shards))])
    return Merged.of(shape, shards, [_pieces(mapping(ranks[rank]), rank, shards[rank]) for rank in range(len(shards))])


def _pieces(own: Mapping[Any, Any], rank: int, shard: Shard) -> list[Strided]:
    entries = own.get("pieces")
    pieces = [_piece(mapping(one)) for one in (entries if isinstance(entries, list) else ())]
    held = sum(piece.numel for piece in pieces)
    if held != shard.numel:
        raise LayoutError(f"rank {rank} holds {shard.numel} elements, and its pieces have {held}")
    return pieces


def _piece(entry: Mapping[Any, Any]) -> Strided:
    full, shard, scale = entry.get("source"), entry.get("dest"), entry.get("scale", 1.0)
    if not all(isinstance(side, (list, tuple)) and len(side) == 2 and is_size(side[0]) for side in (full, shard)):
        raise LayoutError("a piece of it has no offset or strides")
    if not isinstance(scale, (int, float)) or not 0 < abs(scale) < float("inf"):
        raise LayoutError("a piece of it has no scale")
    assert full is not None
    assert shard is not None
    return Strided(_sizes(entry.get("shape")), full[0], _sizes(full[1]), shard[0], _sizes(shard[1]), float(scale))


def _require_shapes(shards: Sequence[Shard], shapes: Shapes) -> None:
    for rank, (shard, shape) in enumerate(zip(shards, shapes, strict=True)):
        if shard.shape != tuple(shape):
            raise LayoutError(f"rank {rank} holds shape {list(shard.shape)}, and the layout says {list(shape)}")


def _names(value: Any) -> frozenset[str]:
    return frozenset(one for one in value if isinstance(one, str)) if isinstance(value, (list, tuple)) else frozenset()


def _sizes(value: Any) -> tuple[int, ...]:
    if not is_sizes(value):
        raise LayoutError("a shape of it is not made of sizes")
    return tuple(value)
