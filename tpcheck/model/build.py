"""Builds the model under a seed, with weights under which bugs show, and the batch of each DP rank at each step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpcheck.core.digests import digest
from tpcheck.core.errors import UsageError
from tpcheck.model.options import Request, RunOptions, Tokens


def build_model(request: Request, device: torch.device) -> nn.Module:
    """Return a new model in the request's dtype; equal requests give bitwise equal models.

    Raises:
        UsageError: `build` does not return a module.
    """
    seed = request.options.seed
    torch.manual_seed(seed)
    model = request.build()
    if not isinstance(model, nn.Module):
        raise UsageError("build", type(model).__name__, "a callable that returns a torch.nn.Module")
    model = model.to(device=device, dtype=getattr(torch, request.options.dtype)).train()
    _disable_dropout(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
            if request.spread_weights and parameter.dim() > 1:
                _spread(parameter)
            _draw_constants(parameter, generator)
    return model


def require_equal_models(model: nn.Module, first: nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    """Check the second of two builds against the first one and its initial state.

    Raises:
        UsageError: They share parameters, or differ although they were built under the same seed.
    """
    if {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in first.parameters()}:
        raise UsageError("build", "the same model twice", "a callable that makes a new model at each call")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in expected or digest(tensor) != digest(expected[name]):
            raise UsageError("build", name, "a model with the same weights each time it is called under one seed")


def loss_of(output: Any, *, with_gradient: bool = True) -> torch.Tensor:
    """Return the loss that a model returns.

    Raises:
        UsageError: There is none.
    """
    if (loss := find_loss(output, with_gradient=with_gradient)) is not None:
        return loss
    raise UsageError(
        "build", type(output).__name__, "a model that returns its loss (a scalar, `.loss`, or the first of a tuple)"
    )


def find_loss(output: Any, *, with_gradient: bool = True) -> torch.Tensor | None:
    """Return the loss: `output.loss`, `output["loss"]`, a scalar output, or the first scalar of a tuple; or None.

    Args:
        with_gradient: Whether what has no gradient is no loss.
    """
    candidates = [getattr(output, "loss", None)]
    if isinstance(output, Mapping):
        candidates.append(output.get("loss"))
    candidates.extend(output if isinstance(output, (tuple, list)) else [output])
    for value in candidates:
        if isinstance(value, torch.Tensor) and value.numel() == 1 and value.requires_grad >= with_gradient:
            return value.reshape(())
    return None


def _spread(matrix: torch.Tensor) -> None:
    """Scale a matrix so that outputs are as large as inputs; the usual 0.02 leaves logits and attention flat."""
    std = matrix.std()
    if std > 0:
        matrix.mul_(matrix.shape[-1] ** -0.5 / std)


def _draw_constants(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Draw rows that are all one value (zero biases, unit norms, padding rows) away from 0 and 1.

    Such defaults hide bugs: a bias of zero can be added any number of times, and all norm weights of one are equal.
    """
    rows = parameter.reshape(1, -1) if parameter.dim() < 2 else parameter.flatten(1)
    constant = (rows == rows[:, :1]).all(dim=1, keepdim=True)
    if not constant.any():
        return
    size = 0.1 + 0.4 * torch.rand(rows.shape, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1
    drawn = rows + (size * sign).to(device=rows.device, dtype=rows.dtype)
    parameter.copy_(torch.where(constant, drawn, rows).reshape(parameter.shape))


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: random masks of sharded activations cannot equal the reference's."""
    for module in model.modules():
        for name, value in vars(module).items():
            is_probability = isinstance(value, float) and 0 < value <= 1
            is_dropout = "drop" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
            if is_probability and is_dropout:
                setattr(module, name, 0.0)


Batch = dict[str, Any]
_FAR_APART = 0x9E3779B1  # 2**32 over the golden ratio: multiples of it are far from each other modulo 2**32


def make_batches(
    options: RunOptions, model: nn.Module, dp: int, device: torch.device, accumulate: int = 1
) -> list[list[list[Batch]]]:
    """Return the micro-batches of every step and DP rank, as batches[step][dp_rank][micro_batch].

    Raises:
        UsageError: The batch cannot be divided among the DP ranks, or the model has no vocabulary to draw tokens from.
    """
    return [
        [
            [
                _batch(options, model, _Place(step, dp_rank, number, dp, accumulate), device)
                for number in range(accumulate)
            ]
            for dp_rank in range(dp)
        ]
        for step in range(options.steps)
    ]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a micro-batch belongs, and how many DP ranks and micro-batches of a step there are."""

    step: int
    dp_rank: int
    micro_batch: int
    dp: int
    accumulate: int


def copy_batch(batch: Mapping[str, Any]) -> Batch:
    """Return the batch with copies of its tensors, which a model may change in place."""
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def moved_batch(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """Return the batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples: the first dim of the first tensor."""
    return next((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()), 1)


def _batch(options: RunOptions, model: nn.Module, place: _Place, device: torch.device) -> Batch:
    if callable(options.batch):
        more = {"micro_batch": place.micro_batch} if place.accumulate > 1 else {}
        batch = options.batch({"dp": place.dp_rank, "tp": 0, **more}, place.step)
        if not isinstance(batch, Mapping):
            raise UsageError("batch", type(batch).__name__, "a callable that returns a dict of tensors")
    elif isinstance(options.batch, Mapping):
        batch = {name: _rows(options.batch, name, place) for name in options.batch}
    else:
        seed = (options.seed * 1000 + place.step) * 1000 + place.dp_rank
        # torch seeds with the low 32 bits alone
        generator = torch.Generator().manual_seed(seed + place.micro_batch * _FAR_APART)
        batch = _draw_tokens(model, options.batch or Tokens(), generator)
        if options.loss == "token_mean":
            _ignore_prompts(batch["labels"], generator)
    return {name: _cast(value, device, getattr(torch, options.dtype)) for name, value in batch.items()}


def _cast(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a tensor on the device, in `dtype` if it is a floating-point one; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _rows(batch: Mapping[str, Any], name: str, place: _Place) -> Any:
    """Return a micro-batch's samples of one entry of the whole batch, or the entry itself if it is not per sample."""
    value, size = batch[name], batch_size(batch)
    if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != size:
        return value
    number = place.dp * place.accumulate
    if size % number:
        by = f"dp={place.dp}" + (f" times accumulate={place.accumulate}" if place.accumulate > 1 else "")
        raise UsageError(f"batch[{name!r}].shape", tuple(value.shape), f"a first dim that {by} divides")
    return value.chunk(number)[place.dp_rank * place.accumulate + place.micro_batch]


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


def _ignore_prompts(labels_BL: torch.Tensor, generator: torch.Generator) -> None:
    """Leave out the labels of a prompt of random length, so that micro-batches have unlike numbers of labels."""
    length = labels_BL.shape[1]
    prompts_B = torch.randint(0, max(1, length - 2), (len(labels_BL),), generator=generator)
    labels_BL.masked_fill_(torch.arange(length) < prompts_B[:, None], -100)


def _attention_mask(tokens: Tokens, generator: torch.Generator) -> torch.Tensor:
    """Return a mask that hides up to half of the tokens, at the end of every sample except the first."""
    shortest = min(2, tokens.length) if tokens.length < 4 else tokens.length // 2
    lengths_B = torch.randint(shortest, tokens.length + 1, (tokens.rows,), generator=generator)
    lengths_B[0] = tokens.length
    return (torch.arange(tokens.length) < lengths_B[:, None]).long()
