"""How a module's output lies in the whole one: rows keyed by the content of samples, columns by the rank's shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod

import torch

from tpcheck.core.digests import FACTORS, mix, odd_keys
from tpcheck.core.placement import Shard
from tpcheck.numerics.sketch import GlobalIndex, RowKeys, row_keys, sample_keys
from tpcheck.runs.recording.slices import Slices


@dataclass(frozen=True, slots=True)
class Place:
    """One way in which a local tensor may lie in the whole; `Reading` keeps it.

    Attributes:
        label: As in `Reading`.
        shape: Of the whole tensor; -1 for a dim of rows that are keyed by content.
        piece: Names the elements, among the ranks of a TP group.
        index: Of the columns, or of all dims where rows are not keyed.
        rows: Keys of the rows; None where they are not keyed.
        is_term: The values are a term of a sum over the TP group.
        order: As in `Reading`.
    """

    label: str
    shape: tuple[int, ...]
    piece: str
    index: GlobalIndex
    rows: RowKeys | None = None
    is_term: bool = False
    order: str = ""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a model was called with: how many samples, of how many positions.

    Attributes:
        samples: One key for each sample, int64; None where the call has no batch dim.
        length: Positions of each sample, such as tokens; None where samples have none.
    """

    samples: torch.Tensor | None = None
    length: int | None = None

    @classmethod
    def of(cls, leaves: Iterable[torch.Tensor]) -> BatchShape:
        """Return the shape of the batch that these tensors make."""
        leaf, has_positions = batch_among(leaves)
        return cls() if leaf is None else cls(sample_keys(leaf), leaf.shape[1] if has_positions else None)


def batch_among(leaves: Iterable[torch.Tensor]) -> tuple[torch.Tensor | None, bool]:
    """Return the tensor that holds the samples, if there is one, and whether its second dim is positions.

    The first integer tensor of two dims or more holds tokens; without one, the first tensor with any dim
    holds samples, whose second dim is positions if there is a third.
    """
    tensors = [leaf for leaf in leaves if leaf.dim()]
    tokens = next((leaf for leaf in tensors if leaf.dim() >= 2 and not _is_real(leaf)), None)
    if tokens is not None:
        return tokens, True
    return (tensors[0], tensors[0].dim() >= 3) if tensors else (None, False)


def _is_real(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool


@dataclass(slots=True)
class ActivationPlaces:
    """Finds the places of the outputs of one call of a model, for one rank of a TP group.

    Of slices, a tensor without samples may hold something for each position, such as a table of rotations.
    """

    batch: BatchShape
    tp: int
    tp_rank: int
    is_sequence_first: bool = False  # positions come before samples, as in Megatron
    slices: Slices | None = None  # where `batch` is this rank's positions of the whole samples
    _rows: dict[tuple[str, int, int], RowKeys] = field(default_factory=dict)

    def places(
        self, tensor: torch.Tensor, *, lies_as_inputs: bool = False, known: GlobalIndex | None = None
    ) -> tuple[Place, ...]:
        """Return every way in which a plain local tensor may lie in the whole; the first takes it as all of it.

        Args:
            lies_as_inputs: Samples and positions are in the order of the model's arguments, whatever it does inside.
            known: Which elements of the whole last dim these are, where that is known.
        """
        rows, num_row_dims, is_slice = self._keyed_rows(tuple(tensor.shape), lies_as_inputs)
        columns = tuple(tensor.shape[num_row_dims:])
        if is_slice:
            return (_place("sequence", f"sequence {self.tp_rank}/{self.tp}", columns, None, rows, num_row_dims),)
        places = [_place("whole", "all", columns, None, rows, num_row_dims), *self._place_by_positions(columns, rows)]
        if known is not None and columns == known.local_shape:
            if known.indices[0] is None:
                return (places[0],)
            return (_place("layout", known.piece(), known.shape, known, rows, num_row_dims),)
        if self.tp > 1 and columns and columns[-1]:
            whole = (*columns[:-1], columns[-1] * self.tp)
            index = _shard_of_columns(whole[-1], self.tp, self.tp_rank)
            piece = f"dim -1 {self.tp_rank}/{self.tp}"
            places.append(_place("dim -1", piece, whole, index, rows, num_row_dims))
        if self.tp > 1 and rows is not None and len(columns) > 1:  # heads, after the samples
            dim, whole = f"dim {num_row_dims}", (columns[0] * self.tp, *columns[1:])
            piece = f"{dim} {self.tp_rank}/{self.tp}"
            places.append(_place(dim, piece, whole, None, rows, num_row_dims, part=(self.tp, self.tp_rank)))
        return tuple(places)

    def _place_by_positions(self, shape: tuple[int, ...], rows: RowKeys | None) -> tuple[Place, ...]:
        """Return where a tensor without samples lies if its first dim of a slice's length is positions."""
        slices, length = self.slices, self.batch.length
        if rows is not None or slices is None or length not in shape or slices.positions.dim() > 1:
            return ()
        dim = shape.index(length)
        indices: list[torch.Tensor | None] = [None] * len(shape)
        indices[dim] = slices.positions.cpu()
        whole = (*shape[:dim], slices.length, *shape[dim + 1 :])
        return (Place("positions", whole, slices.piece, GlobalIndex(whole, tuple(indices))),)

    def places_of_dtensor(self, tensor: torch.Tensor, *, lies_as_inputs: bool = False) -> tuple[Place, ...]:
        """Return the one place of a DTensor, which its placements tell; empty where they cut other dims than these."""
        sizes = tensor.device_mesh.shape  # type: ignore[attr-defined]
        placements = [
            placement
            for placement, size in zip(tensor.placements, sizes, strict=True)  # type: ignore[attr-defined]
            if size > 1
        ]
        if len(placements) > 1:
            return ()
        local: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]
        rows, num_row_dims, is_slice = self._keyed_rows(tuple(local.shape), lies_as_inputs)
        columns = tuple(local.shape[num_row_dims:])
        placement = placements[0] if placements else None
        if placement is None or not placement.is_shard():
            is_term = placement is not None and placement.is_partial()
            return (_place("layout", "all", columns, None, rows, num_row_dims, is_term=is_term),)
        dim = placement.dim % tensor.dim()
        piece = f"dim {dim} {self.tp_rank}/{self.tp}"
        if dim < num_row_dims:
            return (_place("layout", piece, columns, None, rows, num_row_dims),) if is_slice else ()
        if dim != tensor.dim() - 1:
            return ()
        whole = tuple(tensor.shape[num_row_dims:])
        index = GlobalIndex.shard(whole[-1:], Shard(-1), self.tp, self.tp_rank)
        if index.local_shape != columns[-1:]:  # cut over other ranks than these
            return ()
        return (_place("layout", piece, whole, index, rows, num_row_dims),)

    def _keyed_rows(self, shape: tuple[int, ...], lies_as_inputs: bool) -> tuple[RowKeys | None, int, bool]:
        """Return the keys of the rows, how many leading dims are rows, and whether they are this rank's positions.

        Where a shape can be read in two ways, samples come first, as in torch's modules with `batch_first`.
        """
        samples, length = self.batch.samples, self.batch.length
        if samples is None or not shape:
            return None, 0, False
        number = len(samples)
        if length is not None:
            local = length // self.tp if length % self.tp == 0 else length
            for positions, is_slice in ((length, False), (local, True)):
                if is_slice and local == length:
                    break
                is_ambiguous = number == positions and self.is_sequence_first and not lies_as_inputs
                if shape[:2] == (number, positions) and not is_ambiguous:
                    return self._cached("samples", positions, is_slice), 2, is_slice
                if shape[:2] == (positions, number):
                    self.is_sequence_first = True
                    return self._cached("positions", positions, is_slice), 2, is_slice
                if shape[0] == number * positions:
                    order = "positions" if self.is_sequence_first else "samples"
                    return self._cached(order, positions, is_slice), 1, is_slice
        if shape[0] == number:
            return self._cached("samples", 1, False), 1, False
        return None, 0, False

    def _cached(self, order: str, positions: int, is_slice: bool) -> RowKeys:
        """Return the keys of rows in an order: sample by sample, or position by position."""
        key = (order, positions, int(is_slice))
        if key not in self._rows:
            self._rows[key] = self._make_rows(order, positions, is_slice)
        return self._rows[key]

    def _make_rows(self, order: str, positions: int, is_slice: bool) -> RowKeys:
        assert self.batch.samples is not None
        number = len(self.batch.samples)
        length = self.batch.length if is_slice and self.batch.length else positions
        if self.slices is not None and length == self.batch.length:
            whole = row_keys(self.batch.samples, self.slices.length, self.slices.positions)
        else:
            whole = row_keys(self.batch.samples, length)
        first = positions * self.tp_rank if is_slice else 0
        keys, tiles = (each.reshape(number, length)[:, first : first + positions] for each in (whole.keys, whole.tiles))
        if order == "positions":
            keys, tiles = keys.T, tiles.T
        return RowKeys(keys.reshape(-1).contiguous(), tiles.reshape(-1).contiguous())


@dataclass(slots=True)
class SlicedPlaces:
    """Finds the places of outputs of a rank that has slices of samples, under each order that these may be in.

    Attributes:
        by_order: For each order.
        batch: This rank's slices, as samples.
    """

    by_order: Mapping[str, ActivationPlaces]
    batch: BatchShape

    @classmethod
    def of(cls, slices: Sequence[Slices], places: ActivationPlaces) -> SlicedPlaces:
        """Return the places under each order, given those of the slices as samples."""
        by_order = {
            each.order: replace(places, batch=BatchShape(each.samples, places.batch.length), slices=each, _rows={})
            for each in slices
        }
        return cls(by_order, places.batch)

    def places(
        self, tensor: torch.Tensor, *, lies_as_inputs: bool = False, known: GlobalIndex | None = None
    ) -> tuple[Place, ...]:
        """Return every way in which a plain local tensor may lie in the whole; the first takes it as all of it."""
        return self._joined(lambda places: places.places(tensor, lies_as_inputs=lies_as_inputs, known=known))

    def places_of_dtensor(self, tensor: torch.Tensor, *, lies_as_inputs: bool = False) -> tuple[Place, ...]:
        """Return the place of a DTensor under each order."""
        return self._joined(lambda places: places.places_of_dtensor(tensor, lies_as_inputs=lies_as_inputs))

    def _joined(self, find: Callable[[ActivationPlaces], Iterable[Place]]) -> tuple[Place, ...]:
        found: dict[tuple[str, str, str], Place] = {}
        for order, places in self.by_order.items():
            for place in find(places):
                is_ordered = place.rows is not None or place.label == "positions"
                of_order = order if is_ordered else ""
                found.setdefault((of_order, place.label, place.piece), replace(place, order=of_order))
        return tuple(found.values())


@lru_cache(maxsize=256)  # widths of a model's activations; what is derived from an index is kept with it
def _shard_of_columns(width: int, tp: int, tp_rank: int) -> GlobalIndex:
    return GlobalIndex.shard((width,), Shard(-1), tp, tp_rank)


def _place(
    label: str,
    piece: str,
    columns: tuple[int, ...],
    index: GlobalIndex | None,
    rows: RowKeys | None,
    num_row_dims: int,
    *,
    is_term: bool = False,
    part: tuple[int, int] = (1, 0),
) -> Place:
    """Return a place.

    Args:
        columns: The dims of the whole that follow the keyed rows; all but the last are taken as rows, too.
        index: Of the last dim.
        part: Into how many parts the first of `columns` is cut, and which one this is.
    """
    shape = (*(-1,) * num_row_dims, *columns)
    if rows is None:
        whole = GlobalIndex.whole(columns)
        if index is not None:
            whole = replace(whole, indices=(*whole.indices[:-1], *index.indices))
        return Place(label, shape, piece, whole, None, is_term)
    num_parts, number = part
    size = prod(columns[:-1]) // num_parts
    if size * num_parts != 1:
        rows = _cut(rows, number * size, size)
    return Place(label, shape, piece, index or GlobalIndex.whole(columns[-1:]), rows, is_term)


def _cut(rows: RowKeys, first: int, number: int) -> RowKeys:
    """Return the keys of rows of which each is cut into rows, such as the heads of a token, `number` from `first`."""
    of_part = odd_keys(first, number, rows.keys.device)
    keys = mix(rows.keys[:, None] + of_part[None, :], 30, FACTORS[0])
    return RowKeys(keys.reshape(-1), rows.tiles.repeat_interleave(number))
