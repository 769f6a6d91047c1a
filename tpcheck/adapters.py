"""Documented import path: what backends and checkpoint formats implement, and how to find the installed ones."""

from tpcheck.backends.checkpoint_format import Checkpoint, CheckpointFormat, Extent, ReadOptions, RenamedWhenSaved
from tpcheck.backends.interface import (
    Backend,
    Candidate,
    InitialisesModels,
    ReadsLayouts,
    SavesCheckpoints,
    TrainingOptions,
    WayToInitialise,
)
from tpcheck.backends.layout import Layout
from tpcheck.backends.registry import backend_names, checkpoint_formats, layouts_of, load_backend

# Names of version 0.1.
NamedOtherwiseWhenSaved = RenamedWhenSaved
TellsLayouts = ReadsLayouts

__all__ = [
    "Backend",
    "Candidate",
    "Checkpoint",
    "CheckpointFormat",
    "Extent",
    "InitialisesModels",
    "Layout",
    "NamedOtherwiseWhenSaved",
    "ReadOptions",
    "ReadsLayouts",
    "RenamedWhenSaved",
    "SavesCheckpoints",
    "TellsLayouts",
    "TrainingOptions",
    "WayToInitialise",
    "backend_names",
    "checkpoint_formats",
    "layouts_of",
    "load_backend",
]
