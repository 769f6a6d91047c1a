"""Real checkpoints for the tests, made by the libraries themselves in small worlds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import tpcheck
from tpcheck import Topology

State = dict[str, torch.Tensor]


def save_training(
    folder: Path,
    model_type: str = "llama",
    *,
    tp: int = 2,
    dp: int = 1,
    zero: int = 0,
    dtype: str = "float32",
    steps: int = 0,
    settings: Mapping[str, Any] | None = None,
    frozen: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
) -> State:
    """Save a DeepSpeed training checkpoint to the folder and return the state dict of the model that it holds.

    With `steps=0` that is the unsharded model's, as it was before DeepSpeed saw it; after training, what DeepSpeed's
    own layers gather from the live engine.

    Args:
        frozen: Parts of the names of parameters that are not trained.
        config: Merged over the DeepSpeed configuration, section by section.
    """
    with tpcheck.spawn(Topology(tp=tp, dp=dp), timeout=120) as world:
        states = world.run(_save, str(folder), model_type, zero, dtype, steps, settings or {}, frozen, config or {})
    return {name: torch.from_numpy(values).view(getattr(torch, kind)) for name, (values, kind) in states[0].items()}


def random_model(model_type: str, settings: Mapping[str, Any]) -> Any:
    """Return a small model whose every parameter is drawn away from 0 and 1, the same for the same arguments."""
    from tpcheck.families.build import small_model

    torch.manual_seed(7)
    model = small_model(model_type, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.01, 0.2)
    return model


def _save(
    rank: Any,
    folder: str,
    model_type: str,
    zero: int,
    dtype: str,
    steps: int,
    settings: Mapping[str, Any],
    frozen: tuple[str, ...],
    config: Mapping[str, Any],
) -> Any:
    import deepspeed

    from tpcheck.adapters import TrainingOptions
    from tpcheck.backends.deepspeed.candidate import DeepSpeedCandidate
    from tpcheck.backends.deepspeed.config import deepspeed_config

    model = random_model(model_type, settings).to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    reference = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    options = TrainingOptions(dtype=getattr(torch, dtype), zero_stage=zero, batch_size=1, config=config)
    built = deepspeed_config(options, rank.topology.tp)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=built)[0]
    candidate = DeepSpeedCandidate(engine, rank.topology)
    for step in range(steps):
        torch.manual_seed(100 * step + rank.dp_rank)
        tokens = torch.randint(0, model.config.vocab_size, (1, 8))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(folder)
    if steps:
        _gather(reference, candidate, rank)
    return {
        name: (
            value.contiguous().view(torch.uint8).numpy() if value.dtype is torch.bfloat16 else value.numpy(),
            str(value.dtype)[6:],
        )
        for name, value in reference.items()
    }


def _gather(reference: State, candidate: Any, rank: Any) -> None:
    """Put what the engine now holds, in the parameters' own dtype, in place of the start."""
    layouts = candidate.layouts()
    for name, layout in layouts.items():
        shards = rank.gather(candidate.parameter(name))
        reference[name] = layout.assemble([shards[each] for each in rank.topology.peers(rank=rank.rank, axis="tp")])
