"""What a backend must offer, how a sharded tensor is described, and where installed backends are found."""

from tpcheck.adapters.layout import Layout
from tpcheck.adapters.protocols import Backend, Candidate, TrainingOptions
from tpcheck.adapters.registry import backend_names, load_backend

__all__ = ["Backend", "Candidate", "Layout", "TrainingOptions", "backend_names", "load_backend"]
