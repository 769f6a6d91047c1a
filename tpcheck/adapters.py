"""Documented import path: what backends and checkpoint formats must offer, and where they are found."""

from tpcheck.backends.layout import Layout
from tpcheck.backends.protocols import Backend, Candidate, SavesCheckpoints, TellsLayouts, TrainingOptions
from tpcheck.backends.registry import (
    Checkpoint,
    CheckpointFormat,
    Extent,
    NamedOtherwiseWhenSaved,
    ReadOptions,
    backend_names,
    checkpoint_formats,
    layouts_of,
    load_backend,
)

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
