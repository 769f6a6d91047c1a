"""Synthetic batches are what was asked for, and the same each time."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tpcheck.families.tokens import Tokens
from tpcheck.model.batches import batches
from tpcheck.model.options import Request, RunOptions


def made(tokens: Tokens | None) -> dict[str, Any]:
    model: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=9))
    request = Request(nn.Identity, RunOptions(batch=tokens, steps=1))
    return batches(request, model, 1, torch.device("cpu"))[0][0]


def test_the_usual_batch_is_contiguous_and_whole() -> None:
    batch = made(None)
    assert {name: tuple(one.shape) for name, one in batch.items()} == {"input_ids": (2, 16), "labels": (2, 16)}
    assert batch["input_ids"].is_contiguous()


def test_strided_tokens_are_the_same_numbers_elsewhere_in_memory() -> None:
    plain, strided = made(Tokens(3, 7)), made(Tokens(3, 7, strided=True))
    assert all(torch.equal(plain[name], strided[name]) for name in plain)
    assert not any(one.is_contiguous() for one in strided.values())


def test_padding_is_masked_and_counts_for_no_loss() -> None:
    batch = made(Tokens(3, 20, padded=True))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert (batch["labels"][~padding] == batch["input_ids"][~padding]).all()
    assert not padding[:, :10].any()
