"""Checkpoints that DeepSpeed saves in small worlds."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import tpcheck
from tests.checkpoints.reading import State
from tpcheck import Topology

TIED = {"vocab_size": 131, "tie_word_embeddings": True}
UNEVEN = {"vocab_size": 131, "intermediate_size": 97}
FEW_HEADS = {"num_key_value_heads": 2}
"""At tp 4 two ranks hold no attention at all."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A checkpoint and the state dict of its model."""

    folder: Path
    reference: State


class Samples:
    """Saves each checkpoint once, in worlds that stay open; tests copy a folder before they edit it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._worlds: dict[Topology, Any] = {}
        self._saved: dict[str, Sample] = {}
        self._open = ExitStack()

    def training(self, model_type: str = "llama", *, tp: int = 2, dp: int = 1, **options: Any) -> Sample:
        """Return a training checkpoint of DeepSpeed, with the state dict of the model that it holds.

        With `steps=0` that is the unsharded model's before DeepSpeed changes it; after training, the parameters that
        DeepSpeed's layers gather from the live engine, in the dtype of the parameters.

        Args:
            options: Those of `_save`: `zero` (stage), `dtype` (`float32` or `bfloat16`), `steps` (of training before
                saving), `settings` (changes to the small model's configuration), `frozen` (parts of the names of
                parameters that are not trained), `config` (merged over the DeepSpeed configuration), `load_universal`
                (a folder with `latest_universal` to load first).
        """
        key = repr((model_type, tp, dp, sorted(options.items())))
        if key not in self._saved:
            topology = Topology(tp=tp, dp=dp)
            if topology not in self._worlds:
                world = tpcheck.spawn(topology, timeout=120, env={"TORCH_DISTRIBUTED_DEBUG": "OFF"})
                self._worlds[topology] = self._open.enter_context(world)
            folder = self._folder / str(len(self._saved))
            self._saved[key] = Sample(folder, _save_in_world(self._worlds[topology], folder, model_type, options))
        return self._saved[key]

    def universal(self, *, strict: bool = True, **options: Any) -> Sample:
        """Return its universal conversion; the folder above has `latest_universal` and no `latest`."""
        key = repr(("universal", strict, sorted(options.items())))
        if key not in self._saved:
            trained = self.training(**options)
            copy = Path(shutil.copytree(trained.folder, self._folder / str(len(self._saved))))
            self._saved[key] = Sample(_convert_to_universal(copy, strict=strict), trained.reference)
            (copy / "latest").unlink()
        return self._saved[key]

    def close(self) -> None:
        self._open.close()


def _convert_to_universal(folder: Path, *, strict: bool = True) -> Path:
    """Convert the step that `latest` names with DeepSpeed's own script, in this process, and return the new folder."""
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        from deepspeed.checkpoint import ds_to_universal

    step = (folder / "latest").read_text()
    target = folder / f"{step}_universal"
    options = {"keep_temp_folder": False, "strict": strict, "inject_missing_state": False}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    folders = {"input_folder": str(folder / step), "output_folder": str(target)}
    ds_to_universal.main(Namespace(**options, **workers, **folders))
    return target


def _random_model(model_type: str, settings: Mapping[str, Any]) -> Any:
    """Return a small model whose every parameter is drawn away from 0 and 1, the same for the same arguments."""
    from tpcheck.families.build import small_model

    torch.manual_seed(7)
    model = small_model(model_type, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.01, 0.2)
    return model


def _save_in_world(world: Any, folder: Path, model_type: str, options: Mapping[str, Any]) -> State:
    states = world.run(_save, str(folder), model_type, **options)
    return {name: torch.from_numpy(values).view(getattr(torch, kind)) for name, (values, kind) in states[0].items()}


def _save(
    rank: Any,
    folder: str,
    model_type: str,
    *,
    zero: int = 0,
    dtype: str = "float32",
    steps: int = 0,
    settings: Mapping[str, Any] | None = None,
    frozen: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
    load_universal: str | None = None,
) -> Any:
    import deepspeed

    from tpcheck.backends.deepspeed.candidate import DeepSpeedCandidate
    from tpcheck.backends.deepspeed.config import deepspeed_config, merged
    from tpcheck.backends.interface import TrainingOptions

    model = _random_model(model_type, settings or {}).to(getattr(torch, dtype))
    model.register_buffer("counter", torch.arange(3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    reference = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    extra = merged(config or {}, {"checkpoint": {"load_universal": True}} if load_universal else {})
    options = TrainingOptions(dtype=getattr(torch, dtype), zero_stage=zero, batch_size=1, config=extra)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(options, rank.topology.tp))[
        0
    ]
    candidate = DeepSpeedCandidate(engine, rank.topology)
    if load_universal:
        engine.load_checkpoint(load_universal)
    for step in range(steps):
        torch.manual_seed(100 * step + rank.dp_rank)
        tokens = torch.randint(0, model.config.vocab_size, (1, 8))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(folder)
    if steps or load_universal:
        _gather(reference, candidate, rank)
    return {name: _sendable(value) for name, value in reference.items()}


def _gather(reference: State, candidate: Any, rank: Any) -> None:
    """Replace the initial parameters by those of the engine, in the dtype of the parameters."""
    for name, layout in candidate.layouts().items():
        shards = rank.gather(candidate.parameter(name))
        reference[name] = layout.assemble([shards[each] for each in rank.topology.peers(rank=rank.rank, axis="tp")])


def _sendable(value: torch.Tensor) -> tuple[Any, str]:
    plain = value.contiguous().view(torch.int16) if value.dtype is torch.bfloat16 else value
    return plain.numpy(), str(value.dtype).removeprefix("torch.")
