"""The comparison of two runs as the picture that reports draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

from tpcheck.report.run_picture import PicturePhase, RunComparison, ShardOfTiles, TensorPoint, TileMap
from tpcheck.runs.comparing.alignment import AlignedStep
from tpcheck.runs.comparing.comparisons import Comparison
from tpcheck.runs.comparing.run_findings import Answer

MOST_TILE_MAPS = 12
_PHASES: Mapping[str, PicturePhase] = {
    "output": "forward",
    "output_gradient": "backward",
    "gradient": "gradient",
    "weight": "update",
    "buffer": "update",
    "master": "state",
    "state": "state",
}


class PictureMaker:
    """Keeps what is drawn of each step, without its tensors."""

    def __init__(self) -> None:
        self._points: list[TensorPoint] = []
        self._maps: list[tuple[float, TileMap]] = []  # of the worst tensors, the worst first
        self._losses: list[tuple[int, float, float]] = []

    def add_answers(self, answers: Iterable[Answer]) -> None:
        """Add what checks have compared."""
        for answer in answers:
            for order, comparison in enumerate(answer.comparisons):
                phase: PicturePhase = "start" if answer.step < 0 else _PHASES[comparison.kind]
                self._points.append(
                    TensorPoint(
                        answer.step,
                        phase,
                        order,
                        comparison.name,
                        comparison.label,
                        comparison.relative,
                        None if comparison.allowed is None else comparison.relative_allowed,
                        comparison.is_wrong and comparison.label in answer.margins,  # others were left out
                    )
                )
            self._add_maps(answer)

    def add_losses(self, step: AlignedStep) -> None:
        """Add the losses of both runs: the mean over ranks and micro-batches."""
        means = []
        for steps in (step.actual, step.expected):
            losses = [call.loss for each in steps.values() for call in each.passes if call.loss is not None]
            means.append(sum(losses) / len(losses) if losses else None)
        actual, expected = means
        if actual is not None and expected is not None:
            self._losses.append((step.number, actual, expected))

    def picture(self) -> RunComparison:
        return RunComparison(tuple(self._points), tuple(tile_map for _, tile_map in self._maps), tuple(self._losses))

    def _add_maps(self, answer: Answer) -> None:
        for comparison in answer.comparisons:
            severity = comparison.margin if comparison.allowed is not None else comparison.relative
            drawable = not comparison.is_of_norms and isfinite(comparison.error) and comparison.error > 0
            if not drawable or not comparison.expected.shape or not comparison.expected.norm:
                continue
            if len(self._maps) < MOST_TILE_MAPS or severity > self._maps[-1][0]:
                self._maps.append((severity, tile_map(comparison, answer.step)))
                self._maps.sort(key=lambda of_map: -of_map[0])
                del self._maps[MOST_TILE_MAPS:]


def tile_map(comparison: Comparison, step: int) -> TileMap:
    """Return where in a tensor the worst replica is off."""
    worst = max(zip(comparison.errors, comparison.actual.variants, strict=True), key=lambda each: each[0])[1]
    errors = (worst.sketch - comparison.expected.sketch).tile_norms() / comparison.expected.norm
    return TileMap(
        step,
        "start" if step < 0 else _PHASES[comparison.kind],
        comparison.label,
        comparison.expected.shape,
        tuple(tuple(float(error) for error in row) for row in errors),
        tuple(_shards(comparison)),
    )


def _shards(comparison: Comparison) -> Sequence[ShardOfTiles]:
    shards = []
    for ranks in comparison.actual.pieces.values():
        held = comparison.actual.parts[ranks[0]].sketch.tile_norms() != 0
        if bool(held.any()):
            rows, columns = (held.any(dim=1 - axis).nonzero().reshape(-1).tolist() for axis in (0, 1))
            shards.append(ShardOfTiles(ranks, rows[0], rows[-1], columns[0], columns[-1]))
    return shards
