"""Records in, differences out: pure functions on tensors at hand, without processes or live models."""

from tpcheck.compare.difference import Difference, compare_placed, frobenius, frobenius_distance, own_rounding, spacing
from tpcheck.compare.parameters import compare_parameter
from tpcheck.compare.placing import Placed, place
from tpcheck.compare.terms import distance_of_terms

__all__ = [
    "Difference",
    "Placed",
    "compare_parameter",
    "compare_placed",
    "distance_of_terms",
    "frobenius",
    "frobenius_distance",
    "own_rounding",
    "place",
    "spacing",
]
