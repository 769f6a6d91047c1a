"""Labels are counted as the model counts them, and losses weighted where they are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tpcheck import UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.model.labels import batch_with_labels, label_counts, loss_module, takes_count, with_counts
from tpcheck.model.reference import Weighing, train_recorded

VOCABULARY = 7
OPTIONS = TrainingOptions(dtype=torch.float64, max_grad_norm=0.0)


class Model(nn.Module):
    """A language model: `shift` predicts the next token, `counts` divides by the number that it is given."""

    def __init__(self, *, shift: bool = False, counts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)
        self.loss = nn.CrossEntropyLoss()
        self.shift, self.counts = shift, counts
        self.double()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
        logits, labels = self.head(self.embed(tokens)), labels
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if self.counts and options:
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            return {"loss": losses / options["num_items_in_batch"]}
        return {"loss": self.loss(logits.flatten(0, 1), labels.flatten())}


def batch(labels: int, seed: int = 0) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "labels": torch.where(torch.arange(16).reshape(2, 8) >= 16 - labels, tokens, -100)}


@pytest.mark.parametrize(("shift", "counts"), [(False, (16,)), (True, (14,))])
def test_a_label_that_the_loss_leaves_out_is_not_counted(shift: bool, counts: tuple[int, ...]) -> None:
    (step,) = label_counts(Model(shift=shift), [[[batch(16)], [batch(3)]]], "mean")
    assert step.counts == (counts, (3,))


def test_equal_numbers_of_labels_need_no_counts() -> None:
    assert label_counts(Model(), [[[batch(5)], [batch(5)]]], "mean") == ()


def test_a_micro_batch_without_labels_shows_nothing_of_the_model() -> None:
    batches = [[[batch(0), batch(16)]]]
    (step,) = label_counts(Model(shift=True), batches, "token_mean")
    assert step.counts == ((0, 14),)
    assert torch.equal(batch_with_labels(batches)["labels"], batch(16)["labels"])


def test_labels_are_needed_for_a_mean_over_them() -> None:
    with pytest.raises(UsageError, match="the batch has no labels"):
        label_counts(Model(), [[[{"tokens": torch.ones(1, 2)}]]], "token_mean")
    with pytest.raises(UsageError, match="at least one label"):
        label_counts(Model(), [[[batch(0)]]], "token_mean")


def test_a_model_takes_the_count_if_its_loss_changes_with_it() -> None:
    assert takes_count(Model(counts=True), batch(4))
    assert not takes_count(Model(), batch(4))


def test_the_loss_is_that_of_the_innermost_module_that_computes_it() -> None:
    assert loss_module(Model(), batch(4)) == "loss"
    assert loss_module(Model(counts=True), {**batch(4), "num_items_in_batch": torch.tensor(2.0)}) == ""


@pytest.mark.parametrize("counts", [False, True], ids=["weighted", "given the count"])
@pytest.mark.parametrize("numbers", [((2,), (14,)), ((2, 14),), ((3, 0), (5, 1))], ids=str)
def test_the_mean_over_labels_is_that_of_one_batch(numbers: tuple[tuple[int, ...], ...], counts: bool) -> None:
    """The gradient of a step is that of all its samples in one batch, however they are divided."""
    batches = [[[batch(number, 10 * rank + micro) for micro, number in enumerate(of_rank)]
                for rank, of_rank in enumerate(numbers)]]  # fmt: skip
    together = {
        name: torch.cat([each[name] for of_rank in batches[0] for each in of_rank]) for name in batches[0][0][0]
    }
    model = Model(counts=counts)
    labels = label_counts(model, batches, "token_mean")
    if counts:
        batches, weighing = with_counts(batches, labels), Weighing(labels)
    else:
        weighing = Weighing(labels, loss_module(model, batches[0][0][0]))
    (step,) = train_recorded(model, batches, OPTIONS, weighing)
    ((expected,),) = train_recorded(Model(), [[[together]]], OPTIONS)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(step[0].gradients[name], gradient)
    assert sum(each.loss for each in step) / len(step) == pytest.approx(expected.loss)
