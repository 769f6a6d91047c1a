"""What the page about two compared runs draws: a point for each tensor, the tiles of the worst ones, the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PicturePhase = Literal["start", "forward", "backward", "gradient", "update", "state"]


@dataclass(frozen=True, slots=True)
class TensorPoint:
    """One tensor of one step, as a point of the chart.

    Attributes:
        step: Number of the step; -1 before the first.
        phase: Which of the charts it belongs to.
        order: Place in the order of events of its phase.
        name: Of the module or parameter.
        label: With part and call, such as `gradient of lm_head.weight`.
        relative_error: Of the actual tensor.
        relative_allowed: None where nothing was measured.
        is_wrong: More than is allowed.
    """

    step: int
    phase: PicturePhase
    order: int
    name: str
    label: str
    relative_error: float
    relative_allowed: float | None
    is_wrong: bool


@dataclass(frozen=True, slots=True)
class ShardOfTiles:
    """Which tiles hold elements of one rank's part.

    Attributes:
        ranks: Those that hold it.
        first_row, last_row, first_column, last_column: Tiles from 0 to 15, both ends included.
    """

    ranks: tuple[int, ...]
    first_row: int
    last_row: int
    first_column: int
    last_column: int


@dataclass(frozen=True, slots=True)
class TileMap:
    """Where in a tensor the error lies.

    Attributes:
        step, phase, label: Of the tensor, as in `TensorPoint`.
        shape: Of the whole; -1 for rows that are those of samples, whose tiles are positions.
        relative_errors: For each of 16 x 16 tiles the error over the tensor's norm, row by row.
        shards: How the actual run's ranks hold it.
    """

    step: int
    phase: PicturePhase
    label: str
    shape: tuple[int, ...]
    relative_errors: tuple[tuple[float, ...], ...]
    shards: tuple[ShardOfTiles, ...]


@dataclass(frozen=True, slots=True)
class RunComparison:
    """All that is drawn of two runs.

    Attributes:
        points: In the order of steps and events.
        tile_maps: Of the worst tensors, the worst first.
        losses: For each step the losses of the actual and the expected run, where both have one.
    """

    points: tuple[TensorPoint, ...] = ()
    tile_maps: tuple[TileMap, ...] = ()
    losses: tuple[tuple[int, float, float], ...] = ()
