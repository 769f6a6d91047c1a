"""The names of the checks of a run, in their order; `numerics/checks/` has what they do. Loads no torch."""

from __future__ import annotations

CHECK_NAMES = (
    "groups_match_topology",
    "parameters_are_sharded",
    "weights_match_reference",
    "replicas_agree",
    "outputs_match_reference",
    "gradients_match_reference",
    "gradient_norm_matches_reference",
    "updates_match_reference",
    "optimizer_state_matches_reference",
)
"""The checks that run where none is named."""

INITIALISATION_CHECK = "initialisation_matches_reference"
CHECKPOINT_CHECK = "checkpoint_matches_reference"
"""Compares files, not evidence: `verify` runs it where it is named."""
RESUME_CHECK = "resume_matches_uninterrupted"

ON_REQUEST = (INITIALISATION_CHECK, CHECKPOINT_CHECK, RESUME_CHECK)
"""The checks that `verify` runs only where they are named."""
