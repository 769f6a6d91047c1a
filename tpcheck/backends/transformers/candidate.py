"""A model that transformers has sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import transformers

from tpcheck.backends.dtensor.candidate import DTensorCandidate
from tpcheck.backends.peft_models import ways_to_save_adapters


class TransformersCandidate(DTensorCandidate):
    """A model that transformers has sharded, with the public ways to save it."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        model: transformers.PreTrainedModel = self.module
        return ways_to_save_adapters(model) or {
            "save_pretrained": lambda folder: model.save_pretrained(str(folder)),
            "save_pretrained, distributed": lambda folder: model.save_pretrained(
                str(folder), distributed_checkpoint=True
            ),
        }
