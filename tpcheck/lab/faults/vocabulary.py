"""Faults of vocabulary parallelism: wrong lookups in the embedding, losses over a part of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from tpcheck.lab.faults.fault import TP4, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import all_gathered, all_reduced, inject_always, replace_forward

_EMBEDDING = "model.embed_tokens"
_TIED = {"tie_word_embeddings": True}
_SMOOTHING = 0.1
_LOG_TP_LINK = "https://github.com/NVIDIA/Megatron-LM/issues/7452"

_fault = fault_constructor("forward collectives", "outputs_match_reference", family="qwen3", settings=_TIED, steps=1)

Loss = Callable[[Live, Any, Tensor, Tensor], Tensor]  # the head, the logits of its shard, the shifted labels


def _moved(shift: Callable[[Live, int], int]) -> Callable[[Draw], Injection]:
    """Return a fault in which ranks assume that their shard of the vocabulary starts `shift(live, tp_rank)` later."""

    def draw_rank(draw: Draw) -> Injection:
        tp_rank = draw.tp_rank()

        def inject(live: Live) -> None:
            embedding = live.module(_EMBEDDING)
            rows = shift(live, tp_rank)
            embedding.vocab_start_index += rows
            embedding.vocab_end_index += rows

        return Injection(inject, Place(modules=(_EMBEDDING,)))

    return draw_rank


def _one_late(live: Live, tp_rank: int) -> int:
    return int(live.tp_rank == tp_rank)


def _padded(live: Live, tp_rank: int) -> int:
    """Return the distance to the start in a vocabulary that is padded to a multiple of 8 times the ranks."""
    embedding = live.module(_EMBEDDING)
    multiple = 8 * live.tp
    padded = -(-embedding.vocab_size // multiple) * multiple
    start: int = live.tp_rank * padded // live.tp - embedding.vocab_start_index
    return start


def _not_masked(live: Live, layer: Any, tp_rank: int, tokens: Tensor) -> Tensor:
    """Look up tokens of other ranks' shards in the first row, and leave that in the sum."""
    outside = (tokens < layer.vocab_start_index) | (tokens >= layer.vocab_end_index)
    local = (tokens - layer.vocab_start_index).masked_fill(outside, 0)
    return all_reduced(functional.embedding(local, layer.weight), layer.mp_group)


def _replace_loss(loss: Loss) -> Callable[[Draw], Injection]:
    def inject(live: Live) -> None:
        head = live.module("lm_head")

        def of_model(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return loss(live, head, logits[:, :-1], labels[:, 1:])

        live.candidate.module.loss_function = of_model

    return inject_always(inject)


def _label_logit(head: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logit of each label that is in the rank's shard, else 0."""
    is_local = (labels >= head.vocab_start_index) & (labels < head.vocab_end_index)
    local = (labels - head.vocab_start_index).clamp(0, logits.shape[-1] - 1)
    logit: Tensor = logits.gather(-1, local[..., None])[..., 0] * is_local
    return logit


def _log_sum(logits: Tensor, group: Any) -> Tensor:
    return all_reduced(logits.exp().sum(-1), group).log()


def _of_gathered_logits(live: Live, head: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Give the logits of all ranks to a loss that sums over the ranks."""
    by_rank = all_gathered(logits, head.mp_group)
    by_rank[live.tp_rank] = logits
    label = all_reduced(_label_logit(head, logits, labels), head.mp_group)
    return (_log_sum(torch.cat(by_rank, dim=-1), head.mp_group) - label).mean()


def _of_local_vocabulary(live: Live, head: Any, logits: Tensor, labels: Tensor) -> Tensor:
    label = all_reduced(_label_logit(head, logits, labels), head.mp_group)
    return (logits.logsumexp(-1) - label).mean()


def _label_not_reduced(live: Live, head: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return (_log_sum(logits, head.mp_group) - _label_logit(head, logits, labels)).mean()


def _smoothed_over_local_vocabulary(live: Live, head: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Spread the smoothed part of each label over the tokens of this rank's shard."""
    label = all_reduced(_label_logit(head, logits, labels), head.mp_group)
    kept = (1 - _SMOOTHING) * label + _SMOOTHING * logits.mean(-1)
    return (_log_sum(logits, head.mp_group) - kept).mean()


def _label_smoothing() -> AbstractContextManager[Any]:
    return patch.object(functional, "cross_entropy", partial(functional.cross_entropy, label_smoothing=_SMOOTHING))


FAULTS = (
    _fault("vocabulary_starts_one_late", "one rank takes its shard of the vocabulary to start one token late",
           _moved(_one_late), "vocab_offset_wrong", topology=TP4),
    _fault("vocabulary_cut_as_if_padded", "the embedding's shards start where a padded vocabulary would be cut",
           _moved(_padded), "vocab_offset_wrong", settings={**_TIED, "vocab_size": 131}),
    _fault("tokens_of_other_ranks_not_masked",
           "tokens of other ranks' shards are looked up in the first row and summed",
           replace_forward(_not_masked, _EMBEDDING), None),
    _fault("loss_of_gathered_logits",
           "a vocabulary-parallel loss is handed the logits of all ranks, and counts each tp times",
           _replace_loss(_of_gathered_logits), "duplicate_reduce", link=_LOG_TP_LINK),
    _fault("loss_over_the_local_vocabulary",
           "the sum of exponentials in the loss is that of the rank's own vocabulary",
           _replace_loss(_of_local_vocabulary), "missing_reduce"),
    _fault("logit_of_the_label_not_reduced", "a rank that does not have the label's logit takes it for 0",
           _replace_loss(_label_not_reduced), "missing_reduce"),
    _fault("label_smoothing_over_the_local_vocabulary",
           "label smoothing takes the mean over the rank's own vocabulary",
           _replace_loss(_smoothed_over_local_vocabulary), "missing_reduce",
           link="https://github.com/NVIDIA/Megatron-LM/issues/737", training_context=_label_smoothing),
)  # fmt: skip
