"""Known bugs, planted on purpose in what is under test, to prove that a check can fail. Mostly data."""

from tpcheck.faults.checkpoint import CheckpointFault
from tpcheck.faults.corpus import CHECKPOINT_FAULTS, DATA_FAULTS, FAULTS, MODEL_FAULTS, Fault
from tpcheck.faults.data import DataFault
from tpcheck.faults.fault import Draw, Live, ModelFault, Place, Planting
from tpcheck.faults.planted import PlantedBackend

__all__ = [
    "CHECKPOINT_FAULTS",
    "DATA_FAULTS",
    "FAULTS",
    "MODEL_FAULTS",
    "CheckpointFault",
    "DataFault",
    "Draw",
    "Fault",
    "Live",
    "ModelFault",
    "Place",
    "PlantedBackend",
    "Planting",
]
