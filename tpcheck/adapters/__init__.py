"""What backends and checkpoint formats must offer, how a sharded tensor is described, and where they are found."""

from tpcheck.adapters.checkpoints import Checkpoint, CheckpointFormat, Extent, NamedOtherwiseWhenSaved, ReadOptions
from tpcheck.adapters.layout import Layout
from tpcheck.adapters.protocols import Backend, Candidate, SavesCheckpoints, TellsLayouts, TrainingOptions
from tpcheck.adapters.registry import backend_names, checkpoint_formats, layouts_of, load_backend

__all__ = [
    "Backend",
    "Candidate",
    "Checkpoint",
    "CheckpointFormat",
    "Extent",
    "Layout",
    "NamedOtherwiseWhenSaved",
    "ReadOptions",
    "SavesCheckpoints",
    "TellsLayouts",
    "TrainingOptions",
    "backend_names",
    "checkpoint_formats",
    "layouts_of",
    "load_backend",
]
