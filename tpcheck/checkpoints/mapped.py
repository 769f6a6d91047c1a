"""Read checkpoints under other names: renamed by a map, with stacked layers apart and fused parameters together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tpcheck.backends.checkpoint_format import Checkpoint, Extent
from tpcheck.core.errors import UsageError
from tpcheck.core.name_maps import FUSED_PARAMETERS, NameMap

# Megatron's distributed checkpoints keep the layers of a stack in one tensor, whose first dim counts them.
_STACKED = re.compile(r"(?P<head>(?:module\.)*decoder\.layers)\.(?P<tail>(?!\d+\.).+)")


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of a tensor.

    Attributes:
        name: The tensor.
        rows: The rows, of the layer if there is one.
        layer: The index in a stack of layers.
    """

    name: str
    rows: range
    layer: int | None = None


Pieces = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class PiecedView:
    """Tensors that are made of rows of a checkpoint's, under other names; implements `Checkpoint`."""

    checkpoint: Checkpoint
    pieces: Mapping[str, Pieces]
    unread: Mapping[str, str]
    inconsistent_replicas: Mapping[str, str] = field(default_factory=dict)

    @property
    def description(self) -> str:
        return self.checkpoint.description

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def ties(self) -> tuple[frozenset[str], ...]:
        new_names = {parts[0].name: name for name, parts in self.pieces.items() if self._is_whole(parts)}
        kept = (frozenset(new_names[name] for name in tie if name in new_names) for tie in self.checkpoint.ties)
        return tuple(tie for tie in kept if len(tie) > 1)

    def names(self) -> tuple[str, ...]:
        return tuple(self.pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        first = self.pieces[name][0]
        shape = tuple(self.checkpoint.shape(first.name))
        if self._is_whole(self.pieces[name]):
            return shape
        inner = shape[2:] if first.layer is not None else shape[1:]
        return sum(len(piece.rows) for piece in self.pieces[name]), *inner

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype(self.pieces[name][0].name)

    def read(self, name: str, rows: range) -> torch.Tensor:
        if self._is_whole(self.pieces[name]):
            return self.checkpoint.read(self.pieces[name][0].name, rows)
        parts, position = [], 0
        for piece in self.pieces[name]:
            start, stop = max(rows.start - position, 0), min(rows.stop - position, len(piece.rows))
            if start < stop:
                parts.append(self._read(piece, range(piece.rows.start + start, piece.rows.start + stop)))
            position += len(piece.rows)
        return torch.cat(parts)

    def _read(self, piece: Piece, rows: range) -> torch.Tensor:
        if piece.layer is None:
            return self.checkpoint.read(piece.name, rows)
        return self.checkpoint.read(piece.name, range(piece.layer, piece.layer + 1))[0, rows.start : rows.stop]

    def _is_whole(self, parts: Pieces) -> bool:
        return len(parts) == 1 and parts[0].layer is None

    def extent(self, name: str) -> Extent | None:
        parts = self.pieces[name]
        return self.checkpoint.extent(parts[0].name) if self._is_whole(parts) else None

    def require_unchanged(self) -> None:
        self.checkpoint.require_unchanged()

    def close(self) -> None:
        self.checkpoint.close()


def renamed(checkpoint: Checkpoint, names: NameMap, *, is_actual: bool) -> Checkpoint:
    """Return the checkpoint under the names that the map gives its tensors.

    Raises:
        UsageError: A replacement refers to a group that its pattern lacks, no name of the actual side matches a
            pattern, or two tensors get one name.
    """
    idle = names.idle_pattern((*checkpoint.names(), *checkpoint.unread)) if is_actual else None
    if idle is not None:
        first = ", ".join(checkpoint.names()[:3])
        raise UsageError("map", idle, f"a pattern that a name of the actual checkpoint matches, such as {first}")

    def rename(name: str) -> str:
        return names.renamed(name, is_actual=is_actual)

    pieces: dict[str, Pieces] = {}
    for name in checkpoint.names():
        for old_name, part in _unstacked(checkpoint, name) if names.both else ((name, _whole(checkpoint, name)),):
            pieces[rename(old_name)] = (part,)
    if len(pieces) < len(checkpoint.names()):
        raise UsageError("map", ", ".join(names.texts), "a map that gives each tensor a name of its own")
    if all(name == parts[0].name for name, parts in pieces.items()):
        return checkpoint
    unread = {rename(name): why for name, why in checkpoint.unread.items()}
    replicas = {rename(name): why for name, why in checkpoint.inconsistent_replicas.items()}
    return PiecedView(checkpoint, pieces, unread, replicas)


def under_names(checkpoint: Checkpoint, old_names: Mapping[str, str]) -> Checkpoint:
    """Return some tensors of the checkpoint under other names; `old_names` has each one's name there."""
    pieces = {new: (_whole(checkpoint, old),) for new, old in old_names.items()}
    unread = {new: why for new, old in old_names.items() if (why := checkpoint.unread.get(old))}
    return PiecedView(checkpoint, pieces, unread)


def _whole(checkpoint: Checkpoint, name: str) -> Piece:
    shape = checkpoint.shape(name)
    return Piece(name, range(shape[0] if shape else 1))


def _unstacked(checkpoint: Checkpoint, name: str) -> Iterator[tuple[str, Piece]]:
    """Yield each layer of a stack under the name that it has alone; the tensor itself where it is no stack."""
    stacked, shape = _STACKED.fullmatch(name), tuple(checkpoint.shape(name))
    if stacked is None or len(shape) < 2:
        yield name, _whole(checkpoint, name)
        return
    for layer in range(shape[0]):
        yield f"{stacked['head']}.{layer}.{stacked['tail']}", Piece(name, range(shape[1]), layer)


def fused_alike(actual: Checkpoint, expected: Checkpoint) -> tuple[Checkpoint, Checkpoint] | None:
    """Return both sides with Q, K and V, gate and up together where one of them keeps these so; else None."""
    sides = (actual, expected)
    new_sides = [_with_fused(side, other) for side, other in (sides, sides[::-1])]
    if all(new is None for new in new_sides):
        return None
    return new_sides[0] or actual, new_sides[1] or expected


def _with_fused(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint | None:
    """Return the checkpoint with the parts of those tensors together that the other side has fused."""
    names = dict.fromkeys(checkpoint.names())
    pieces: dict[str, Pieces] = {name: (_whole(checkpoint, name),) for name in names}
    unread = dict(checkpoint.unread)
    for name in other.names():
        parts = next((found for fusion in FUSED_PARAMETERS if (found := fusion.parts_of(name))), ())
        if not parts or name in names or not all(part in names for part in parts):
            continue
        wholes = tuple(_whole(checkpoint, part) for part in parts)
        by_group = _is_by_group(other, name)
        together = _by_group(wholes, {**other.config, **checkpoint.config}) if by_group else wholes
        if together is None:
            unread[name] = "the order of its heads is unknown: no config.json states num_key_value_heads"
        else:
            pieces[name] = together
        for part in parts:
            pieces.pop(part, None)
    if pieces.keys() == names.keys():
        return None
    return PiecedView(checkpoint, pieces, unread, checkpoint.inconsistent_replicas)


def _is_by_group(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a fused Q, K and V has those of each key-value head together, as Megatron's linear_qkv."""
    stored = checkpoint.pieces[name][0].name if isinstance(checkpoint, PiecedView) else name
    return "linear_qkv" in stored


def _by_group(parts: Sequence[Piece], config: Mapping[str, Any]) -> Pieces | None:
    """Return the queries, the key and the value of each key-value head in turn; None where it is unknown how to cut."""
    groups = config.get("num_key_value_heads", config.get("num_query_groups"))
    if not isinstance(groups, int) or groups < 1 or any(len(part.rows) % groups for part in parts):
        return None
    sizes = [len(part.rows) // groups for part in parts]
    return tuple(
        Piece(part.name, range(group * size, (group + 1) * size), part.layer)
        for group in range(groups)
        for part, size in zip(parts, sizes, strict=True)
    )
