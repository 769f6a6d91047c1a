"""What the losses of a step are divided by: labels counted as the model counts them, and losses weighted by them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tpcheck.core.errors import UsageError
from tpcheck.model.build import Batch, copy_batch, find_loss
from tpcheck.numerics.evidence import LabelCounts
from tpcheck.numerics.tensors import map_tensors, state_restored

LABELS = ("labels", "label", "targets", "target")
"""Names under which a batch has its labels."""
IGNORED = -100  # the ignore_index of torch's cross_entropy, and of transformers
COUNT = "num_items_in_batch"
"""The argument by which transformers' models are told what to divide by."""


def label_counts(model: nn.Module, batches: Sequence[Sequence[Sequence[Batch]]], loss: str) -> tuple[LabelCounts, ...]:
    """Return the labels of each step; nothing where the batches have none that can be counted.

    A causal language model predicts the next token, so that its first label is not counted: whether this model does is
    read off its loss.

    Args:
        batches: batches[step][dp_rank][micro_batch].

    Raises:
        UsageError: Labels are needed for `token_mean`, and there are none.
    """
    first = batch_with_labels(batches)
    name = labels_name(first)
    if name is None:
        if loss == "token_mean":
            raise UsageError("loss", loss, f"mean: the batch has no {' or '.join(LABELS)} of integers to count")
        return ()
    either = [_counts(batches, name, loss, shifted=shifted) for shifted in (False, True)]
    if loss == "mean" and not any(step.differ for steps in either for step in steps):
        return ()  # both ways to divide are the same: the model need not be asked
    steps = either[_first_label_is_ignored(model, first, name)]
    if loss == "token_mean" and not all(step.total for step in steps):
        raise UsageError("batch", 0, f"at least one label of a step that is not {IGNORED}")
    return steps if all(step.total for step in steps) else ()


def _counts(
    batches: Sequence[Sequence[Sequence[Batch]]], name: str, loss: str, *, shifted: bool
) -> tuple[LabelCounts, ...]:
    return tuple(
        LabelCounts(tuple(tuple(_count(batch[name], shifted) for batch in of_rank) for of_rank in step), loss)
        for step in batches
    )


def batch_with_labels(batches: Sequence[Sequence[Sequence[Batch]]]) -> Batch:
    """Return the micro-batch of the first step with the most labels: the loss of one without any shows nothing."""
    micro_batches = [batch for of_rank in batches[0] for batch in of_rank]
    name = labels_name(micro_batches[0])
    return micro_batches[0] if name is None else max(micro_batches, key=lambda batch: _count(batch[name], False))


def labels_name(batch: Mapping[str, Any]) -> str | None:
    """Return the entry of a batch that has its labels: integers; None where there is none."""
    return next((name for name in LABELS if _are_labels(batch.get(name))), None)


def _are_labels(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32) and value.dim() > 0


def _count(labels: torch.Tensor, shifted: bool) -> int:
    return int((labels[..., 1:] if shifted else labels).ne(IGNORED).sum())


def _first_label_is_ignored(model: nn.Module, batch: Batch, name: str) -> bool:
    """Return whether the loss is the same without the first label of each sample, and with another one."""
    labels = batch[name]
    if labels.dim() < 2 or labels.shape[-1] < 2:
        return False
    try:
        losses = [_loss_with_first_label(model, batch, name, label) for label in (IGNORED, 0)]
    except Exception:  # a model to which -100 is no label counts all
        return False
    return losses[0] == losses[1]


def _loss_with_first_label(model: nn.Module, batch: Batch, name: str, label: int) -> float:
    labels = batch[name].clone()
    labels[..., 0] = label
    return _loss(model, {**batch, name: labels})


def _loss(model: nn.Module, batch: Batch) -> float:
    """Return the loss of a batch without a trace in the model; nan where it returns none."""
    with state_restored(model), torch.enable_grad():
        loss = find_loss(model(**copy_batch(batch)))
    return float("nan") if loss is None else float(loss.detach())


def with_counts(batches: Sequence[Sequence[Sequence[Batch]]], labels: Sequence[LabelCounts]) -> list[list[list[Batch]]]:
    """Return the batches with the number that the model divides by, where it does: see `takes_count`.

    It is the labels of the step, where losses are added up. Where replicas and micro-batches are averaged afterwards,
    it is those per micro-batch.
    """
    return [
        [[{**batch, COUNT: torch.tensor(_divisor(step))} for batch in of_rank] for of_rank in of_step]
        for of_step, step in zip(batches, labels, strict=True)
    ]


def _divisor(step: LabelCounts) -> float:
    return step.total / (1 if step.adds_up else sum(map(len, step.counts)))


def takes_count(model: nn.Module, batch: Batch) -> bool:
    """Return whether the model divides the sum of its losses by the `num_items_in_batch` that it is given.

    Its signature says whether it may be given one, and its loss whether it makes a difference.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if COUNT in batch or not (takes_any or COUNT in parameters):
        return False
    try:
        losses = [_loss(model, {**batch, COUNT: torch.tensor(float(number))}) for number in (1, 2)]
    except TypeError:  # some function inside takes no such argument
        return False
    return losses[0] != losses[1]


@contextmanager
def loss_times(model: nn.Module, weight: float, path: str | None) -> Iterator[None]:
    """Multiply the loss by a weight inside the module that computes it, so that all that follows sees the product.

    Args:
        path: The module, as `loss_module` returns it.
    """
    if weight == 1 or path is None:
        yield
        return

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        loss = find_loss(output)
        assert loss is not None
        value = loss.detach()
        return map_tensors(lambda tensor: tensor * weight if _is_that(tensor, value) else tensor, output)

    handle = model.get_submodule(path).register_forward_hook(scale, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _is_that(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    return tensor.numel() == 1 and tensor.requires_grad and bool(tensor.detach().reshape(()) == value)


def loss_module(model: nn.Module, batch: Batch) -> str:
    """Return the innermost module that computes the loss: the first whose output it is."""
    losses: list[tuple[str, float]] = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if (loss := find_loss(output)) is not None:
                losses.append((name, float(loss.detach())))

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in model.named_modules()]
    try:
        total = _loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name, loss in losses if loss == total), "")


def with_a_label(batch: Batch, name: str) -> Batch:
    """Return a batch of which the last token has a label: without any, a mean over them does not exist."""
    labels = batch[name].clone()
    labels[..., -1] = 0
    return {**batch, name: labels}
