"""Documented import path of `tpcheck.lab.faults`: known bugs, injected on purpose to prove that a check can fail."""

from tpcheck.lab.faults.checkpoint import CheckpointFault
from tpcheck.lab.faults.corpus import CHECKPOINT_FAULTS, DATA_FAULTS, FAULTS, MODEL_FAULTS, Fault
from tpcheck.lab.faults.data import DataFault
from tpcheck.lab.faults.fault import Draw, FaultyBackend, Injection, Live, ModelFault, Place

PlantedBackend = FaultyBackend  # the earlier names
Planting = Injection

__all__ = [
    "CHECKPOINT_FAULTS",
    "DATA_FAULTS",
    "FAULTS",
    "MODEL_FAULTS",
    "CheckpointFault",
    "DataFault",
    "Draw",
    "Fault",
    "FaultyBackend",
    "Injection",
    "Live",
    "ModelFault",
    "Place",
    "PlantedBackend",
    "Planting",
]
