"""The batch that each DP rank trains on at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tpcheck.core.errors import UsageError
from tpcheck.families.tokens import Tokens
from tpcheck.model.options import Request

_LEFT_OUT = -100  # of cross_entropy: a label that counts for nothing

Batch = dict[str, Any]


def batches(request: Request, model: nn.Module, dp: int, device: torch.device) -> list[list[Batch]]:
    """Return the batch of every step and DP rank, as batches[step][dp_rank].

    Raises:
        UsageError: The batch cannot be cut over DP, or none can be made up for this model.
    """
    return [
        [_batch(request, model, step, dp_rank, dp, device) for dp_rank in range(dp)]
        for step in range(request.options.steps)
    ]


def copied(batch: Mapping[str, Any]) -> Batch:
    """Return the batch with tensors of its own, for one run of a model that may change them."""
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return how many samples a batch holds: the first dim of its first tensor."""
    return next((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()), 1)


def _batch(request: Request, model: nn.Module, step: int, dp_rank: int, dp: int, device: torch.device) -> Batch:
    if callable(request.options.batch):
        batch = request.options.batch({"dp": dp_rank, "tp": 0}, step)
        if not isinstance(batch, Mapping):
            raise UsageError("batch", type(batch).__name__, "a callable that returns a dict of tensors")
    elif isinstance(request.options.batch, Mapping):
        batch = {name: _rows(name, value, dp_rank, dp, request) for name, value in request.options.batch.items()}
    else:
        generator = torch.Generator().manual_seed((request.options.seed * 1000 + step) * 1000 + dp_rank)
        batch = _synthetic_tokens(model, request.options.batch or Tokens(), generator)
    return {name: _placed(value, device, getattr(torch, request.options.dtype)) for name, value in batch.items()}


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a tensor on the model's device, floating-point ones in its dtype; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _rows(name: str, value: Any, dp_rank: int, dp: int, request: Request) -> Any:
    assert isinstance(request.options.batch, Mapping)
    size = batch_size(request.options.batch)
    if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != size:
        return value
    if size % dp:
        raise UsageError(f"batch[{name!r}].shape", tuple(value.shape), f"a first dim that dp={dp} divides")
    return value.chunk(dp)[dp_rank]


def _synthetic_tokens(model: nn.Module, wanted: Tokens, generator: torch.Generator) -> Batch:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab_size = getattr(text_config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise UsageError("batch", None, "a dict or a callable: this model has no config.vocab_size to draw tokens from")
    tokens_BL = torch.randint(0, vocab_size, (wanted.rows, wanted.length), generator=generator)
    batch = {"input_ids": tokens_BL, "labels": tokens_BL.clone()}
    if wanted.padded:
        mask_BL = _padding(wanted, generator)
        batch["labels"].masked_fill_(mask_BL == 0, _LEFT_OUT)
        batch["attention_mask"] = mask_BL
    return {name: _strided(tensor) if wanted.strided else tensor for name, tensor in batch.items()}


def _padding(wanted: Tokens, generator: torch.Generator) -> torch.Tensor:
    """Return a mask that leaves out up to half of the tokens at the end of each sample but the first."""
    least = min(2, wanted.length) if wanted.length < 4 else wanted.length // 2
    lengths_B = torch.randint(least, wanted.length + 1, (wanted.rows,), generator=generator)
    lengths_B[0] = wanted.length
    return (torch.arange(wanted.length) < lengths_B[:, None]).long()


def _strided(tensor_BL: torch.Tensor) -> torch.Tensor:
    """Return equal numbers whose rows lie across memory."""
    return tensor_BL.t().contiguous().t()
