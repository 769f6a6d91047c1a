"""The batch that each DP rank trains on at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tpcheck.core.errors import UsageError
from tpcheck.model.options import RunOptions, Tokens

Batch = dict[str, Any]


def make_batches(options: RunOptions, model: nn.Module, dp: int, device: torch.device) -> list[list[Batch]]:
    """Return the batch of every step and DP rank, as batches[step][dp_rank].

    Raises:
        UsageError: The batch cannot be divided among the DP ranks, or the model has no vocabulary to draw tokens from.
    """
    return [
        [_batch(options, model, step, dp_rank, dp, device) for dp_rank in range(dp)] for step in range(options.steps)
    ]


def copy_batch(batch: Mapping[str, Any]) -> Batch:
    """Return the batch with copies of its tensors, which a model may change in place."""
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples: the first dim of the first tensor."""
    return next((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()), 1)


def _batch(options: RunOptions, model: nn.Module, step: int, dp_rank: int, dp: int, device: torch.device) -> Batch:
    if callable(options.batch):
        batch = options.batch({"dp": dp_rank, "tp": 0}, step)
        if not isinstance(batch, Mapping):
            raise UsageError("batch", type(batch).__name__, "a callable that returns a dict of tensors")
    elif isinstance(options.batch, Mapping):
        batch = {name: _rows(options.batch, name, dp_rank, dp) for name in options.batch}
    else:
        generator = torch.Generator().manual_seed((options.seed * 1000 + step) * 1000 + dp_rank)
        batch = _draw_tokens(model, options.batch or Tokens(), generator)
    return {name: _cast(value, device, getattr(torch, options.dtype)) for name, value in batch.items()}


def _cast(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a tensor on the device, in `dtype` if it is a floating-point one; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _rows(batch: Mapping[str, Any], name: str, dp_rank: int, dp: int) -> Any:
    """Return the DP rank's samples of one entry of the whole batch, or the entry itself if it is not per sample."""
    value, size = batch[name], batch_size(batch)
    if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != size:
        return value
    if size % dp:
        raise UsageError(f"batch[{name!r}].shape", tuple(value.shape), f"a first dim that dp={dp} divides")
    return value.chunk(dp)[dp_rank]


def _draw_tokens(model: nn.Module, tokens: Tokens, generator: torch.Generator) -> Batch:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab_size = getattr(text_config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise UsageError("batch", None, "a dict or a callable: this model has no config.vocab_size to draw tokens from")
    tokens_BL = torch.randint(0, vocab_size, (tokens.rows, tokens.length), generator=generator)
    batch = {"input_ids": tokens_BL, "labels": tokens_BL.clone()}
    if tokens.padded:
        mask_BL = _attention_mask(tokens, generator)
        batch["labels"].masked_fill_(mask_BL == 0, -100)  # the ignore_index of cross_entropy
        batch["attention_mask"] = mask_BL
    # equal values in memory that is not contiguous
    return {name: tensor.t().contiguous().t() if tokens.strided else tensor for name, tensor in batch.items()}


def _attention_mask(tokens: Tokens, generator: torch.Generator) -> torch.Tensor:
    """Return a mask that hides up to half of the tokens, at the end of every sample except the first."""
    shortest = min(2, tokens.length) if tokens.length < 4 else tokens.length // 2
    lengths_B = torch.randint(shortest, tokens.length + 1, (tokens.rows,), generator=generator)
    lengths_B[0] = tokens.length
    return (torch.arange(tokens.length) < lengths_B[:, None]).long()
