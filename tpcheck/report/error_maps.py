"""Heat maps of where in a wrong tensor the error lies, for the pages about one run and about two compared ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, prod
from typing import Any

from tpcheck.core.findings import Finding
from tpcheck.report import words
from tpcheck.report.charts import MAP_WIDTH, Outline, heat_map, shortened, tile_spans
from tpcheck.report.run_picture import TileMap


@dataclass(frozen=True, slots=True)
class DrawnMap:
    """A heat map and what it says in words; the heading names the tensor where no finding beside it does."""

    svg: str
    caption: str
    heading: str = ""


def _largest(errors: Sequence[Sequence[float]], titles: Sequence[Sequence[str]]) -> str:
    """Return the title of the tile with the largest error; what is not finite is largest."""
    pairs = (pair for of_row in zip(errors, titles, strict=True) for pair in zip(*of_row, strict=True))
    return max(pairs, key=lambda pair: pair[0] if isfinite(pair[0]) else inf)[1]


# ---- of one run: from a finding's evidence

_MOST_LABELS = 16  # of shards in a map
_HIGHEST_TILE = 28.0


def map_of_finding(finding: Finding) -> DrawnMap | None:
    """Return the map of the error that a finding's evidence holds; None where it holds none."""
    known = finding.evidence.get("error_map")
    if not known or not known["tiles"]:
        return None
    errors = [[inf if error is None else float(error) for error in row] for row in known["tiles"]]
    if not any(map(any, errors)):
        return None
    height, width = len(errors), len(errors[0])
    shape = [int(size) for size in known["shape"]]
    rows, columns = prod(shape[:-1]), shape[-1]
    outlines = [
        Outline(
            first_row=shard["rows"][0] * height / rows,
            last_row=shard["rows"][1] * height / rows - 1,
            first_column=shard["columns"][0] * width / columns,
            last_column=shard["columns"][1] * width / columns - 1,
            label=words.ranks(shard["ranks"]),
        )
        for shard in known["shards"]
    ]
    titles = _titles(errors, rows, columns, is_vector=len(shape) == 1)
    largest = _largest(errors, titles)
    caption = "; ".join([_shape_of_finding(shape), f"largest error in {largest}", *_holders(known["shards"])])
    is_cut = len(outlines) > 1
    if len(outlines) > _MOST_LABELS:
        outlines = [replace(line, label="") for line in outlines]
    tile = MAP_WIDTH / width, min(MAP_WIDTH / height, _HIGHEST_TILE)
    text = f"Error over the tiles of the tensor: {caption}."
    svg = heat_map(errors, titles, outlines if is_cut else [], text, tile=tile)
    return DrawnMap(svg, caption)


def _titles(errors: Sequence[Sequence[float]], rows: int, columns: int, *, is_vector: bool) -> list[list[str]]:
    noun = "elements" if is_vector else "columns"
    of_rows = [""] if is_vector else [f"{text}, " for _, text in tile_spans("rows", rows, len(errors))]
    of_columns = [text for _, text in tile_spans(noun, columns, len(errors[0]))]
    return [
        [f"{row}{column}: {words.error(error)}" for column, error in zip(of_columns, of_row, strict=True)]
        for row, of_row in zip(of_rows, errors, strict=True)
    ]


def _shape_of_finding(shape: Sequence[int]) -> str:
    if len(shape) == 1:
        return words.pluralize(shape[0], "element")
    how = "" if len(shape) == 2 else ", all dims but the last as rows"
    return f"{' x '.join(map(str, shape))}{how}"


def _holders(shards: Sequence[Mapping[str, Any]]) -> list[str]:
    if not shards:
        return []
    if len(shards) == 1:
        return [f"{words.ranks(shards[0]['ranks'])} {'holds' if len(shards[0]['ranks']) == 1 else 'hold'} all of it"]
    return ["lines are borders between the shards of ranks"]


# ---- of two compared runs: from the tiles of their sketches

_EDGE = 16  # tiles along each side of a map
_LONGEST_LABEL = 10  # of a shard, beside the map


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile that is drawn: its place in the map, and what it holds."""

    row: int
    column: int
    holds: str


def map_of_tiles(tile_map: TileMap) -> DrawnMap:
    """Return the map of a tensor of two runs, with a heading that names the tensor and its step."""
    tiles = _tiles(tile_map)
    errors = [[tile_map.relative_errors[tile.row][tile.column] for tile in row] for row in tiles]
    outlines = _outlines(tile_map, tiles)
    titles = [
        [
            f"{tile.holds}{_held_by(row, column, outlines)}: error {words.error(errors[row][column])}"
            for column, tile in enumerate(listed)
        ]
        for row, listed in enumerate(tiles)
    ]
    everything = (0, len(tiles) - 1, 0, len(tiles[0]) - 1)
    is_cut = any(
        (line.first_row, line.last_row, line.first_column, line.last_column) != everything for line in outlines
    )
    ranks = [line.label for line in outlines]
    held = f"cut into the shards of {', '.join(ranks[:_EDGE])}" if is_cut else f"held whole by {' and '.join(ranks)}"
    step = "before the first step" if tile_map.step < 0 else f"step {tile_map.step}"
    heading = f"{shortened(tile_map.label)}, {step}"
    caption = "; ".join(
        [_shape_of_tiles(tile_map.shape), f"largest error in {_largest(errors, titles)}", *([held] if ranks else [])]
    )
    svg = heat_map(errors, titles, outlines if is_cut else [], f"Error over the tiles of {heading}: {caption}.")
    return DrawnMap(svg, caption, heading)


def _shape_of_tiles(shape: Sequence[int]) -> str:
    if shape[:1] == (-1,):
        return f"positions of samples down, {shape[-1]} columns across"
    if len(shape) < 2:
        return f"{words.pluralize(shape[0] if shape else 1, 'element')}, row by row"
    return f"{' x '.join(map(str, shape))}, rows down, columns across"


def _tiles(tile_map: TileMap) -> list[list[Tile]]:
    """Return the tiles that hold elements: rows are all dims but the last; a vector fills the tiles row by row."""
    shape = tile_map.shape
    if len(shape) < 2:
        spans = tile_spans("elements", shape[0] if shape else 1, _EDGE**2)
        tiles = [Tile(*divmod(tile, _EDGE), holds) for tile, holds in spans]
        return [tiles[start : start + _EDGE] for start in range(0, len(tiles), _EDGE)]
    rows = _positions(tile_map) if shape[0] == -1 else tile_spans("rows", prod(shape[:-1]), _EDGE)
    columns = tile_spans("columns", shape[-1], _EDGE)
    return [[Tile(row, column, f"{of_row}, {of_column}") for column, of_column in columns] for row, of_row in rows]


def _positions(tile_map: TileMap) -> list[tuple[int, str]]:
    """Return the tiles of positions, whose number the shape does not tell; short samples leave tiles between empty."""
    held = {row for row, errors in enumerate(tile_map.relative_errors) if any(errors)}
    drawn: Sequence[int] = range(_EDGE)
    for size in range(_EDGE - 1, 3, -1):
        tiles = [tile for tile, _ in tile_spans("positions", size, _EDGE)]
        if len(held) > size // 2 and held.issubset(tiles):
            drawn = tiles
    return [(tile, f"positions from {tile}/{_EDGE} of the sample on") for tile in drawn]


def _outlines(tile_map: TileMap, tiles: Sequence[Sequence[Tile]]) -> list[Outline]:
    """Return the shards among the tiles that are drawn; those in the same tiles as one."""
    if tiles[0][-1].row != tiles[0][0].row:  # a vector so short that tiles between are empty
        return []
    rows, columns = [row[0].row for row in tiles], [tile.column for tile in tiles[0]]
    ranks: dict[tuple[int, int, int, int], list[int]] = {}
    for shard in tile_map.shards:
        span = (
            *_within(shard.first_row, shard.last_row, rows),
            *_within(shard.first_column, shard.last_column, columns),
        )
        ranks.setdefault(span, []).extend(shard.ranks)
    # Tiles at the edge may be zero on all ranks: what is not cut along an axis reaches from edge to edge.
    row_spans, column_spans = {span[:2] for span in ranks}, {span[2:] for span in ranks}
    return [
        Outline(
            *(span[:2] if len(row_spans) > 1 else (0, len(rows) - 1)),
            *(span[2:] if len(column_spans) > 1 else (0, len(columns) - 1)),
            _short_ranks(sorted(set(listed))),
        )
        for span, listed in ranks.items()
    ]


def _within(first: int, last: int, tiles: Sequence[int]) -> tuple[int, int]:
    inside = [index for index, tile in enumerate(tiles) if first <= tile <= last]
    return (inside[0], inside[-1]) if inside else (0, len(tiles) - 1)


def _short_ranks(ranks: Sequence[int]) -> str:
    text = words.ranks(ranks)
    return text if len(text) <= _LONGEST_LABEL else f"{ranks[0]} to {ranks[-1]}"


def _held_by(row: int, column: int, outlines: Sequence[Outline]) -> str:
    labels = [
        line.label
        for line in outlines
        if line.first_row <= row <= line.last_row and line.first_column <= column <= line.last_column
    ]
    return f" ({', '.join(labels)})" if labels else ""
