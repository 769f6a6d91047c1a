"""What a batch holds, apart from order and padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tpcheck.batches.leaves import as_tensor, entries
from tpcheck.batches.samples import contents

TOKENS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def unpadded(tensor: torch.Tensor) -> str | None:
    return contents({"ids": tensor}, {"ids": (2, 3)})["ids"].get("unpadded")


def test_padding_on_either_side_is_taken_off() -> None:
    padding = torch.zeros(2, 4, dtype=torch.int64)
    assert unpadded(TOKENS) == unpadded(torch.cat([TOKENS, padding], -1)) == unpadded(torch.cat([padding, TOKENS], -1))


def test_more_tokens_are_no_padding() -> None:
    assert unpadded(torch.cat([TOKENS, TOKENS], -1)) is None


def test_rows_are_told_without_their_order() -> None:
    one, other = (contents({"x": rows}, {})["x"]["rows"] for rows in (TOKENS, TOKENS.flip(0)))
    assert one == other
    assert one != contents({"x": TOKENS + 1}, {})["x"]["rows"]


def test_an_attention_mask_says_what_is_kept() -> None:
    def kept(ids: list[int], mask: list[int]) -> str:
        tensors = {"text.ids": torch.tensor([ids]), "text.attention_mask": torch.tensor([mask])}
        return contents(tensors, {})["text.ids"]["kept"]

    assert kept([5, 6, 0, 0], [1, 1, 0, 0]) == kept([9, 5, 6], [0, 1, 1])
    assert kept([5, 6, 0, 0], [1, 1, 0, 0]) != kept([5, 6, 0, 0], [1, 1, 1, 0])


def test_an_attention_mask_keeps_vectors_too() -> None:
    def kept(vectors: torch.Tensor, mask: list[int]) -> str:
        tensors = {"embeddings": vectors[None], "attention_mask": torch.tensor([mask])}
        return contents(tensors, {})["embeddings"]["kept"]

    one, other = torch.randn(2, 8), torch.randn(1, 8)
    assert kept(torch.cat([one, other]), [1, 1, 0]) == kept(torch.cat([other, other, one]), [0, 0, 1, 1])
    assert kept(torch.cat([one, other]), [1, 1, 0]) != kept(torch.cat([one, other]), [1, 1, 1])


def test_images_are_cut_in_every_dim_but_the_first() -> None:
    image = torch.randn(2, 3, 4, 5)
    wide = torch.nn.functional.pad(image, (0, 3, 2, 0))
    shortest = {"pixels": (2, 3, 4, 5)}
    told = [contents({"pixels": each}, shortest)["pixels"]["unpadded"] for each in (image, wide)]
    assert told[0] == told[1]
    assert "unpadded" not in contents({"pixels": torch.randn(2, 3, 4, 6)}, shortest)["pixels"]
    assert "unpadded" not in contents({"pixels": image}, {"pixels": ()})["pixels"]


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "float16"])
def test_an_array_is_told_as_a_tensor(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    (entry,) = entries(array)
    tensor = as_tensor(entry)
    assert tensor is not None
    assert tensor.tolist() == array.tolist()


@pytest.mark.parametrize("array", [np.array(["a", "b"]), np.array([1], dtype="datetime64[s]")])
def test_an_array_without_a_counterpart_is_left_out(array: Any) -> None:
    (entry,) = entries(array)
    assert as_tensor(entry) is None
