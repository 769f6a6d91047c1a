"""Losses of one's own over the ranks' parts of the vocabulary, and mistakes in them.

Shape suffixes: B samples, L tokens, V the vocabulary, or a rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tpcheck.backends.interface import RankLike
from tpcheck.lab.faults.hand_written import HandWrittenControl, HandWrittenFault
from tpcheck.lab.faults.hand_written_model import VOCABULARY, Function, LossOfLogits, Model, Style, inside, reduced

_SMOOTHING, _Z_WEIGHT, _BETA = 0.1, 0.05, 0.5


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The part of the vocabulary of which a rank has logits, and how sums over all of it are made.

    Attributes:
        start, size: The first token, and how many there are.
        reduce: Sums over the ranks.
    """

    start: int
    size: int
    reduce: Function

    def sum(self, values_BLV: Tensor) -> Tensor:
        return self.reduce(values_BLV.sum(-1))

    def log_sum_exp(self, logits_BLV: Tensor) -> Tensor:
        return self.sum(logits_BLV.exp()).log()

    def part(self, values_BLV: Tensor) -> Tensor:
        return values_BLV[..., self.start : self.start + self.size]

    def of_labels(self, values_BLV: Tensor, labels_BL: Tensor) -> Tensor:
        hot_BLV = functional.one_hot(labels_BL, VOCABULARY).to(values_BLV.dtype)
        return self.sum(values_BLV * self.part(hot_BLV))

    def negative_log_likelihood(self, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
        return self.log_sum_exp(logits_BLV) - self.of_labels(logits_BLV, labels_BL)


def _same(tensor: Tensor) -> Tensor:
    return tensor


WHOLE = Vocabulary(0, VOCABULARY, _same)


def label_smoothing(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Give every token a share of the label's probability."""
    mean_BL = vocabulary.sum(logits_BLV) / VOCABULARY
    smooth_BL = vocabulary.log_sum_exp(logits_BLV) - mean_BL
    likely_BL = vocabulary.negative_log_likelihood(logits_BLV, labels_BL)
    return ((1 - _SMOOTHING) * likely_BL + _SMOOTHING * smooth_BL).mean()


def distillation(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Return the KL divergence of the student from a teacher."""
    return _divergence(logits_BLV, labels_BL, vocabulary, vocabulary.log_sum_exp(logits_BLV))


def _teacher(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the logarithms of the teacher's probabilities, which depend on the labels alone."""
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64).to(logits_BLV)
    return vocabulary.part(functional.log_softmax(teacher, -1)[labels_BL])


def _divergence(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary, log_sum_exp_BL: Tensor) -> Tensor:
    teacher_BLV = _teacher(logits_BLV, labels_BL, vocabulary)
    terms_BL = vocabulary.sum(teacher_BLV.exp() * (teacher_BLV - logits_BLV))
    return (terms_BL + log_sum_exp_BL).mean()  # the teacher's probabilities add up to 1


def z_loss(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Add the square of the log-sum-exp, which keeps it small."""
    square_BL = vocabulary.log_sum_exp(logits_BLV).square()
    return (vocabulary.negative_log_likelihood(logits_BLV, labels_BL) + _Z_WEIGHT * square_BL).mean()


def weighted_tokens(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Weigh each token by its label."""
    weights_BL = (0.5 + labels_BL / VOCABULARY).to(logits_BLV)
    return (weights_BL * vocabulary.negative_log_likelihood(logits_BLV, labels_BL)).sum() / weights_BL.sum()


def unsure_tokens(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Weigh each token by how unlikely its label is, as a constant: no gradient is to come back through the weight."""
    unlikely_BL = vocabulary.negative_log_likelihood(logits_BLV, labels_BL)
    return ((1 - (-unlikely_BL.detach()).exp()) * unlikely_BL).mean()


def per_sample(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Return the root mean square of the samples' losses."""
    return vocabulary.negative_log_likelihood(logits_BLV, labels_BL).mean(-1).square().mean().sqrt()


def preferences(logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Prefer the first half of the samples to the second, as DPO does, over the tokens that are no prompt."""
    return _preferred(logits_BLV, labels_BL, vocabulary, *_answers(labels_BL).chunk(2))


def _answers(labels_BL: Tensor) -> Tensor:
    return torch.arange(labels_BL.shape[-1]).expand_as(labels_BL) >= 3


def _preferred(
    logits_BLV: Tensor, labels_BL: Tensor, vocabulary: Vocabulary, chosen_mask_BL: Tensor, rejected_mask_BL: Tensor
) -> Tensor:
    likely_BL = -vocabulary.negative_log_likelihood(logits_BLV, labels_BL)
    chosen_BL, rejected_BL = likely_BL.chunk(2)
    margin_B = (chosen_BL * chosen_mask_BL).sum(-1) - (rejected_BL * rejected_mask_BL).sum(-1)
    return -functional.logsigmoid(_BETA * margin_B).mean()


def _vocabulary_of(rank: RankLike) -> Vocabulary:
    size = VOCABULARY // rank.topology.tp
    return Vocabulary(rank.topology.coordinate(rank.rank)["tp"] * size, size, reduced(rank.group("tp")))


def over_the_ranks(model: Model, rank: RankLike) -> None:
    """Compute the model's own loss over the ranks' parts of the vocabulary."""
    of_vocabulary: Any = model.loss.unsharded  # one of this file, whose third argument is the vocabulary
    model.loss.of_logits = partial(of_vocabulary, vocabulary=_vocabulary_of(rank))


def _mistaken(name: str, loss: Callable[[Vocabulary, int, Tensor, Tensor], Tensor]) -> Style:
    """Return what replaces the loss by `loss(vocabulary, tp_rank, logits, labels)`."""

    def inject(model: Model, rank: RankLike) -> None:
        vocabulary, tp_rank = _vocabulary_of(rank), rank.topology.coordinate(rank.rank)["tp"]
        model.loss.of_logits = lambda logits, labels: loss(vocabulary, tp_rank, logits, labels)

    inject.__name__ = name
    return inject


# ---- mistakes


def _smoothed_over_part(vocabulary: Vocabulary, tp_rank: int, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Take the mean over the tokens of one rank for that over the vocabulary."""
    smooth_BL = vocabulary.log_sum_exp(logits_BLV) - logits_BLV.mean(-1)
    likely_BL = vocabulary.negative_log_likelihood(logits_BLV, labels_BL)
    return ((1 - _SMOOTHING) * likely_BL + _SMOOTHING * smooth_BL).mean()


def _divergence_from_part(vocabulary: Vocabulary, tp_rank: int, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Normalise the student over the tokens of one rank."""
    return _divergence(logits_BLV, labels_BL, vocabulary, logits_BLV.exp().sum(-1).log())


def _divergence_of_parts(vocabulary: Vocabulary, tp_rank: int, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Subtract the log-sum-exp within the terms of each rank: its gradient is that of these terms alone."""
    teacher_BLV = _teacher(logits_BLV, labels_BL, vocabulary)
    student_BLV = logits_BLV - vocabulary.log_sum_exp(logits_BLV)[..., None]
    return vocabulary.sum(teacher_BLV.exp() * (teacher_BLV - student_BLV)).mean()


def _z_per_rank(vocabulary: Vocabulary, tp_rank: int, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Add the z-loss of every rank, which is the same on all."""
    square_BL = vocabulary.reduce(vocabulary.log_sum_exp(logits_BLV).square())
    return (vocabulary.negative_log_likelihood(logits_BLV, labels_BL) + _Z_WEIGHT * square_BL).mean()


def _z_of_part(vocabulary: Vocabulary, tp_rank: int, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Square the log-sum-exp of one rank's tokens."""
    square_BL = logits_BLV.exp().sum(-1).log().square()
    return (vocabulary.negative_log_likelihood(logits_BLV, labels_BL) + _Z_WEIGHT * square_BL).mean()


def _weights_of_part(vocabulary: Vocabulary, tp_rank: int, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Weigh each token by the number of its label within one rank's part of the vocabulary."""
    weights_BL = (0.5 + (labels_BL - vocabulary.start).clamp(0) / VOCABULARY).to(logits_BLV)
    return (weights_BL * vocabulary.negative_log_likelihood(logits_BLV, labels_BL)).sum() / weights_BL.sum()


def _other_mask(vocabulary: Vocabulary, tp_rank: int, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Count the prompt of the rejected samples on one rank."""
    chosen_BL, rejected_BL = _answers(labels_BL).chunk(2)
    if tp_rank == 1:
        rejected_BL = torch.ones_like(rejected_BL)
    return _preferred(logits_BLV, labels_BL, vocabulary, chosen_BL, rejected_BL)


def _options(loss: LossOfLogits) -> dict[str, object]:
    return {"loss": loss, "passes": 2} if loss is preferences else {"loss": loss}


def _row(
    name: str,
    what: str,
    mistake: Callable[..., Tensor],
    loss: LossOfLogits,
    *causes: str | None,
    check: str = "outputs_match_reference",
) -> HandWrittenFault:
    return HandWrittenFault(
        name,
        what,
        _mistaken(name, mistake),
        ("loss", ""),
        causes,
        checks=(check,),
        options=_options(loss),
        kind="losses",
    )


FAULTS = (
    _row("smoothing_over_local_vocabulary", "labels are smoothed over one rank's part of the vocabulary",
         _smoothed_over_part, label_smoothing, None),
    _row("divergence_with_local_log_sum_exp", "a distillation normalises the student over one rank's vocabulary",
         _divergence_from_part, distillation, None),
    _row("divergence_misses_gradients", "a distillation's log-sum-exp gets the gradient of one rank's terms alone",
         _divergence_of_parts, distillation, None, check="gradients_match_reference"),
    _row("z_loss_counted_per_rank", "the z-loss of every rank is added", _z_per_rank, z_loss, None),
    _row("z_loss_of_local_vocabulary", "the z-loss is that of one rank's part of the vocabulary", _z_of_part, z_loss,
         None),
    _row("token_weights_of_local_labels", "tokens are weighed by their labels' numbers on one rank",
         _weights_of_part, weighted_tokens, None),
    _row("preference_under_another_mask", "one rank counts the prompts of rejected samples", _other_mask, preferences,
         None),
)  # fmt: skip

CONTROLS = tuple(
    HandWrittenControl(inside, _options(loss), also=over_the_ranks)
    for loss in (label_smoothing, distillation, z_loss, weighted_tokens, unsure_tokens, per_sample, preferences)
)
