"""The public ways to save a model made of DTensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from tpcheck.backends.dtensor.candidate import DTensorCandidate


class SavingCandidate(DTensorCandidate):
    """A candidate that torch's own checkpointing saves."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        return {"distributed checkpoint": self._save_distributed, "full state dict": self._save_full}

    def _save_distributed(self, folder: Path) -> None:
        save(get_model_state_dict(self.module), checkpoint_id=str(folder))

    def _save_full(self, folder: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.module, options=options)
        if dist.get_rank() == 0:
            torch.save(state, folder / "pytorch_model.bin")
