"""Searches for configurations under which what is sharded is not what it was made of."""

from tpcheck.api.fuzz.draws import Bounds
from tpcheck.api.fuzz.family import Common, fuzz_family
from tpcheck.api.fuzz.layers import LayerCommon, fuzz_layers, read_trial, try_one
from tpcheck.api.fuzz.search import Limits

__all__ = ["Bounds", "Common", "LayerCommon", "Limits", "fuzz_family", "fuzz_layers", "read_trial", "try_one"]
