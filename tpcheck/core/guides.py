"""The guides of the documentation, and where a message says to read on. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

_DOCUMENTATION = "https://github.com/tpcheck/tpcheck/tree/main/docs"  # of [project.urls]
START = f"{_DOCUMENTATION}/start.md"


class Guide(Enum):
    """A page of `docs/guides`, which answers a question; the value is its file's name without `.md`."""

    BEFORE_LAUNCH = "before-launch"
    DATA_INCONSISTENCY = "data-inconsistency"
    LORA = "lora"
    LOSS_DIFFERS = "loss-differs"
    NOISE = "noise"
    OWN_MODEL = "own-model"
    RESUME = "resume"
    SAVED_MODEL = "saved-model"
    WHICH_MODELS = "which-models"
    WHICH_RANKS = "which-ranks"

    @property
    def url(self) -> str:
        return f"{_DOCUMENTATION}/guides/{self.value}.md"


# Where a finding of the check leads to, unless its cause has a guide of its own.
GUIDE_OF_CHECK: Mapping[str, Guide] = {
    "groups_match_topology": Guide.WHICH_RANKS,
    "parameters_are_sharded": Guide.WHICH_MODELS,
    "weights_match_reference": Guide.WHICH_MODELS,
    "outputs_match_reference": Guide.LOSS_DIFFERS,
    "gradients_match_reference": Guide.LOSS_DIFFERS,
    "gradient_norm_matches_reference": Guide.LOSS_DIFFERS,
    "updates_match_reference": Guide.LOSS_DIFFERS,
    "optimizer_state_matches_reference": Guide.LOSS_DIFFERS,
    "replicas_agree": Guide.LOSS_DIFFERS,
    "batches_agree_within_tp": Guide.DATA_INCONSISTENCY,
    "batches_differ_across_dp": Guide.DATA_INCONSISTENCY,
    "samples_come_once": Guide.RESUME,
    "checkpoint_matches_reference": Guide.SAVED_MODEL,
    "resume_matches_uninterrupted": Guide.RESUME,
    "initialisation_matches_reference": Guide.LOSS_DIFFERS,
}
