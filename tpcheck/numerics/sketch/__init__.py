"""A tensor in eight kilobytes, whose shards' add up to the whole's: what they are, in `sketches.py`."""

from tpcheck.numerics.global_index import GlobalIndex
from tpcheck.numerics.sketch.row_keys import RowKeys, keys_of_sums, row_keys, sample_keys, slice_sums
from tpcheck.numerics.sketch.signs import SIGN_SETS, TILES
from tpcheck.numerics.sketch.sketches import PendingSketch, Sketch, distance, fetch_sketches, sketch, start_sketch
from tpcheck.numerics.sketch.sums import FLOAT32_ROUNDING

__all__ = [
    "FLOAT32_ROUNDING",
    "SIGN_SETS",
    "TILES",
    "GlobalIndex",
    "PendingSketch",
    "RowKeys",
    "Sketch",
    "distance",
    "fetch_sketches",
    "keys_of_sums",
    "row_keys",
    "sample_keys",
    "sketch",
    "slice_sums",
    "start_sketch",
]
